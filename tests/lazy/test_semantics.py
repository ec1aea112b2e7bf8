"""What __init__ code does to tensors besides creating them: aliases, copies, reads, generators, dtypes."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gemini.lazy import LazyInitContext, is_lazy, materialize


class Made(nn.Module):
    """A module whose __init__ is the given function."""

    def __init__(self, init):
        super().__init__()
        init(self)


def case(function):
    CASES[function.__name__] = function
    return function


CASES = {}


@case
def fill_through_a_view_of_data(m):
    m.w = nn.Parameter(torch.zeros(3, 4))
    m.w.data.view(-1).fill_(5)
    m.w.data.view(2, 6)[1].normal_()


@case
def writes_through_chunks_and_splits(m):
    m.w = nn.Parameter(torch.empty(9, 4))
    for i, part in enumerate(m.w.data.chunk(3)):
        nn.init.normal_(part, std=i + 1.0)
    m.w.detach().split([2, 7])[1].mul_(2)


@case
def clone_then_change_the_original(m):
    m.x = nn.Parameter(torch.randn(4))
    m.y = nn.Parameter(m.x.clone())
    with torch.no_grad():
        m.x.add_(1)


@case
def data_of_another_parameter(m):
    m.a, m.b = nn.Linear(3, 3), nn.Linear(3, 3)
    m.b.weight.data = m.a.weight.data
    nn.init.normal_(m.a.weight)


@case
def slices_and_indexing(m):
    m.w = nn.Parameter(torch.ones(6, 6))
    with torch.no_grad():
        m.w[2] = 3.0
        m.w[:, 1:3].uniform_()
        m.w[torch.tensor([0, 5])] = torch.randn(2, 6)
        m.w[m.w > 2.5] = -1.0
    m.register_buffer("mask", torch.tril(torch.ones(6, 6)).bool())
    m.register_buffer("row", m.w.data[3])


@case
def a_parameter_that_is_part_of_a_buffer(m):
    m.register_buffer("whole", torch.randn(10))
    m.part = nn.Parameter(m.whole[2:5])
    with torch.no_grad():
        m.part.mul_(10)


@case
def deepcopy_of_layers(m):
    layer = nn.Linear(4, 4)
    layer.register_buffer("head", layer.weight.data[0])
    layer.register_buffer("scale", torch.rand(4))
    layer.register_buffer("scale_view", layer.scale[1:])
    layer.weight.mark = ["kept"]
    m.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
    nn.init.normal_(layer.weight)
    nn.init.zeros_(m.layers[1].scale_view)
    m.first = layer


@case
def load_state_dict_between_lazy_modules(m):
    m.a, m.b = nn.Linear(4, 4), nn.Linear(4, 4)
    m.b.load_state_dict(m.a.state_dict())
    nn.init.uniform_(m.a.weight)


@case
def load_state_dict_by_assignment(m):
    m.a, m.b = nn.Linear(4, 4), nn.Linear(4, 4)
    m.b.load_state_dict(m.a.state_dict(), assign=True)


@case
def copy_between_parameters(m):
    m.a, m.b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.empty(3, 5))
    with torch.no_grad():
        m.b.copy_(m.a)
        m.b[0].copy_(m.b[1] * 2)


@case
def tied_and_untied_weights(m):
    m.a, m.b, m.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    m.b.weight = m.a.weight
    m.c.weight = nn.Parameter(m.a.weight)
    nn.init.xavier_normal_(m.b.weight)


@case
def orthogonal_and_truncated_init(m):
    m.a, m.b, m.c, m.d = (nn.Parameter(torch.empty(6, 4)) for _ in range(4))
    nn.init.orthogonal_(m.a)
    nn.init.trunc_normal_(m.b, std=1.5)
    nn.init.sparse_(m.c, 0.5)
    nn.init.trunc_normal_(m.d, std=3.0, a=-0.1, b=0.1)
    m.e = nn.Parameter(torch.empty(3, 3, 3))
    nn.init.dirac_(m.e)


@case
def numpy_and_python_data(m):
    table = np.arange(12.0).reshape(3, 4)
    m.w = nn.Parameter(torch.empty(3, 4))
    m.w.data.copy_(torch.from_numpy(table))
    table[:] = -1
    m.v = nn.Parameter(torch.FloatTensor(np.sin(np.arange(4))))
    m.register_buffer("t", torch.tensor([[1, 2], [3, 4]]))
    m.register_buffer("s", torch.tensor(2.5))
    m.w.data.mul_(m.s)


@case
def reads_of_fixed_values(m):
    m.w = nn.Parameter(torch.randn(3))
    rates = [x.item() for x in torch.linspace(0, 0.3, 4)]
    m.v = nn.Parameter(torch.full((4,), sum(rates)))
    m.u = nn.Parameter(torch.tensor(torch.arange(5).tolist()[::-1], dtype=torch.float64))
    m.n = nn.Parameter(torch.zeros(int(torch.tensor(3)), 2))


@case
def reads_of_random_values(m):
    m.w = nn.Parameter(torch.randn(64))
    if m.w.sum() > 0:
        nn.init.normal_(m.w, mean=7.0)
    else:
        nn.init.uniform_(m.w)
    m.first = nn.Parameter(torch.full((2,), m.w[0].item()))
    m.rest = nn.Parameter(torch.randn(8))
    m.positive = nn.Parameter(m.rest[m.rest > 0])
    m.array = nn.Parameter(torch.as_tensor(m.rest.detach().numpy() * 2))
    m.order = nn.Parameter(torch.randperm(10).float())
    m.count = nn.Parameter(torch.randn(int(torch.randint(3, 9, ()))))


@case
def a_seed_inside(m):
    m.a = nn.Parameter(torch.randn(5))
    torch.manual_seed(77)
    m.b = nn.Parameter(torch.randn(5))
    torch.manual_seed(1234)  # the very state that construction began with
    m.c = nn.Parameter(torch.randn(5))


@case
def a_forked_generator(m):
    m.a = nn.Parameter(torch.randn(5))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        m.b = nn.Parameter(torch.randn(5))
    m.c = nn.Parameter(torch.randn(5))
    state = torch.get_rng_state()
    m.d = nn.Parameter(torch.randn(5))
    torch.set_rng_state(state)
    m.e = nn.Parameter(torch.randn(5))


@case
def an_explicit_generator(m):
    generator = torch.Generator().manual_seed(9)
    m.a = nn.Parameter(torch.empty(5, 5))
    nn.init.kaiming_uniform_(m.a, generator=generator)
    m.b = nn.Parameter(torch.randn(3, generator=generator))
    generator.manual_seed(9)
    m.c = nn.Parameter(torch.randn(20, generator=generator))
    m.d = nn.Parameter(torch.randn(3))


@case
def draws_into_a_real_array(m):
    m.a = nn.Parameter(torch.randn(5))
    noise = np.zeros(5)
    torch.from_numpy(noise).normal_()
    m.b = nn.Parameter(torch.randn(5))


@case
def dead_values_still_draw(m):
    torch.randn(100)
    m.a = nn.Parameter(torch.empty(5))
    m.a.data.normal_()
    torch.bernoulli(torch.rand(7))
    nn.functional.dropout(torch.ones(9))
    torch.multinomial(torch.rand(4), 2)
    m.a.data.uniform_()


@case
def dtypes(m):
    m.a = nn.Linear(3, 3, dtype=torch.float64)
    m.b = nn.Linear(3, 3).half()
    m.c = nn.Linear(3, 3).to(torch.bfloat16)
    m.c.weight.requires_grad_(False)
    torch.set_default_dtype(torch.float64)
    m.d = nn.Linear(3, 3)
    m.register_buffer("e", torch.arange(3) / 2)
    torch.set_default_dtype(torch.float32)
    m.register_buffer("f", torch.polar(torch.ones(3), torch.arange(3.0)))
    m.register_buffer("g", torch.randint(0, 9, (4,)))


@case
def geometry_in_place(m):
    m.w = nn.Parameter(torch.randn(3, 5))
    m.w.data.normal_()
    t = torch.randn(2, 3)
    t.t_()
    t.unsqueeze_(0)
    m.v = nn.Parameter(t)
    r = torch.empty(0)
    r.resize_(4).fill_(2)
    m.u = nn.Parameter(r)
    m.register_buffer("expanded", torch.randn(3, 1).expand(3, 4))


@case
def parametrization_and_fused_writes(m):
    m.a, m.b = nn.Linear(3, 3), nn.Linear(3, 3)
    with torch.no_grad():
        torch._foreach_mul_(list(m.parameters()), 0.5)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()) + 1, m.parameters())
        torch.add(m.a.weight, 1, out=m.b.weight)


@case
def attributes_that_are_not_registered(m):
    m.w = nn.Parameter(torch.randn(3))
    m.plain = torch.randn(3)
    m.nested = {"list": [torch.randn(2), (m.w, m.w.data)]}
    m.register_buffer("absent", None)
    m.register_buffer("fleeting", torch.randn(2), persistent=False)


@case
def complex_and_integer_buffers(m):
    m.register_buffer("phase", torch.polar(torch.ones(3), torch.randn(3)))
    m.register_buffer("index", torch.randint(0, 9, (4,)))
    m.register_buffer("mask", torch.rand(4) > 0.5, persistent=False)
    m.w = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    m.parts = nn.Parameter(torch.view_as_real(m.w.data))
    m.conjugate = nn.Parameter(m.w.data.conj())
    m.register_buffer("picked", m.w.data.real[m.index % 3])


@case
def sparse_nested_and_quantised_tensors(m):
    m.w = nn.Parameter(torch.randn(3))
    m.register_buffer(
        "sparse", torch.sparse_coo_tensor(torch.tensor([[0, 2]]), m.w.data[:2], (3,), check_invariants=False).to_dense()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on nested and quantised tensors
        nested = torch.nested.nested_tensor([m.w.data[:1], m.w.data[1:]])
        quantised = torch.quantize_per_tensor(m.w.data, 0.1, 0, torch.qint8)
    m.register_buffer("nested", nested.to_padded_tensor(0.0))
    m.register_buffer("quantised", quantised.dequantize())
    m.after = nn.Parameter(torch.randn(3))


@pytest.mark.parametrize("name", CASES)
def test_init_code_gives_what_eager_gives(name, check_lazy_equals_eager):
    check_lazy_equals_eager(lambda: Made(CASES[name]))


def test_plain_tensor_attributes_become_real_too():
    torch.manual_seed(0)
    eager = Made(attributes_that_are_not_registered)
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = Made(attributes_that_are_not_registered)
    materialize(lazy)
    assert torch.equal(eager.plain, lazy.plain)
    assert torch.equal(eager.nested["list"][0], lazy.nested["list"][0])
    assert lazy.nested["list"][1][0] is lazy.w
    lazy.w.data.fill_(4)
    assert torch.equal(lazy.nested["list"][1][1], torch.full((3,), 4.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_after_the_context_is_recorded(dtype):
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(dtype).requires_grad_(False)
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    parameters = list(lazy.parameters())
    lazy.to(dtype).requires_grad_(False)
    materialize(lazy)
    assert all(a is b for a, b in zip(parameters, lazy.parameters(), strict=True))
    for (name, a), (_, b) in zip(eager.state_dict().items(), lazy.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert not any(p.requires_grad for p in lazy.parameters())


def test_initialisation_after_the_context_goes_on_in_the_same_program(check_lazy_equals_eager):
    def late(model):
        for p in model.parameters():
            nn.init.normal_(p)
        model.load_state_dict({"bias": torch.arange(4.0)}, strict=False)
        return copy.deepcopy(model)

    torch.manual_seed(0)
    eager = late(nn.Linear(4, 4))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = nn.Linear(4, 4)
    lazy = materialize(late(lazy))
    assert torch.equal(eager.weight, lazy.weight) and torch.equal(eager.bias, lazy.bias)
    assert torch.equal(torch.get_rng_state(), state)


def test_contexts_that_follow_each_other_are_one_program():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with LazyInitContext():
        c = nn.Linear(4, 4)
    with LazyInitContext():
        d = nn.Linear(4, 4)
    d.weight = c.weight
    materialize(d)
    assert d.weight is c.weight and not is_lazy(c.weight) and is_lazy(c.bias)
    materialize(c)
    assert torch.equal(a.weight, c.weight) and torch.equal(a.bias, c.bias) and torch.equal(b.bias, d.bias)
    assert torch.equal(torch.get_rng_state(), state)


def test_nested_contexts_share_one_program():
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    torch.manual_seed(0)
    with LazyInitContext():
        first = nn.Linear(3, 3)
        with LazyInitContext(default_device="cpu"):
            second = nn.Linear(3, 3)
        lazy = nn.Sequential(first, second, nn.Linear(3, 3))
    materialize(lazy)
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), lazy.parameters(), strict=True))


def test_a_lazy_model_can_be_materialised_inside_its_context():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    torch.manual_seed(0)
    with LazyInitContext():
        c = LazyInitContext.materialize(nn.Linear(3, 3))
        d = nn.Linear(3, 3)
    materialize(d)
    assert torch.equal(a.weight, c.weight) and torch.equal(b.weight, d.weight)


class TestGlobalGenerator:
    def test_recording_and_waiting_draw_nothing(self):
        torch.manual_seed(0)
        expected = torch.randn(2000)
        torch.manual_seed(0)
        with LazyInitContext():
            model = nn.Linear(50, 50)
        assert torch.equal(torch.randn(2000), expected)
        state = torch.get_rng_state()
        materialize(model)
        assert torch.equal(torch.get_rng_state(), state), "someone drew in between, so it must be left alone"

    def test_a_seed_set_between_context_and_materialisation_wins_even_if_it_is_the_same(self):
        torch.manual_seed(0)
        with LazyInitContext():
            model = nn.Linear(5, 5)
        torch.manual_seed(0)
        expected = torch.get_rng_state()
        materialize(model)
        assert torch.equal(torch.get_rng_state(), expected)

    @pytest.mark.parametrize("draws", [0, 1, 7, 623, 624, 625, 1300])
    def test_the_mark_left_in_the_state_changes_no_number(self, draws):
        from gemini.lazy.rng import _tagged

        generator = torch.Generator().manual_seed(draws)
        torch.rand(draws, generator=generator)
        twin = torch.Generator()
        twin.set_state(_tagged(generator.get_state(), 0x2AAAAAAA))
        assert draws == 0 or not torch.equal(twin.get_state(), generator.get_state())
        for numbers in (torch.rand, torch.randn):
            assert torch.equal(numbers(3000, generator=generator), numbers(3000, generator=twin))

    def test_an_explicit_generator_ends_where_eager_leaves_it(self):
        a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        eager = torch.randn(40, generator=a)
        with LazyInitContext():
            lazy = Made(lambda m: setattr(m, "w", nn.Parameter(torch.randn(40, generator=b))))
        materialize(lazy)
        assert torch.equal(eager, lazy.w) and torch.equal(a.get_state(), b.get_state())
