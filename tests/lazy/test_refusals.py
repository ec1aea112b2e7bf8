"""What cannot be lazy says so, names the remedy, and leaves torch as it was."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from torch import nn

import gemini.lazy
from gemini.errors import LazyInitError
from gemini.lazy import LazyInitContext, is_lazy, materialize

REMEDY = re.escape("LazyInitContext.materialize(model)") + ".*booster.boost"


@pytest.fixture
def model() -> nn.Module:
    with LazyInitContext():
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def test_a_forward_before_materialisation_names_the_remedy(model):
    for module, batch in [(model, torch.tensor([1])), (model[1], torch.ones(1, 4)), (model[2], torch.ones(1, 4))]:
        with pytest.raises(LazyInitError, match=REMEDY):
            module(batch)
    with LazyInitContext():
        others = [(nn.Conv2d(1, 1, 3), torch.ones(1, 1, 5, 5)), (nn.LSTM(2, 2), torch.ones(1, 1, 2)),
                  (nn.MultiheadAttention(2, 1), torch.ones(1, 1, 2))]  # fmt: skip
    for module, batch in others:
        with pytest.raises(LazyInitError, match=REMEDY):
            module(batch, batch, batch) if isinstance(module, nn.MultiheadAttention) else module(batch)


def test_a_transformers_forward_before_materialisation_names_the_remedy():
    transformers = pytest.importorskip("transformers")
    with LazyInitContext():
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(LazyInitError, match=REMEDY):
        gpt2(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("read", [
    lambda w: w[0, 0].item(), lambda w: w.tolist(), lambda w: bool((w > 0).all()), lambda w: w.detach().numpy(),
    lambda w: float(w.sum()), lambda w: torch.empty(4, 4).copy_(w), lambda w: w @ torch.ones(4), lambda w: w @ w,
    lambda w: torch.ones(4, 4) + w, lambda w: pickle.dumps(w), lambda w: torch.equal(w, w), lambda w: w.nonzero(),
])  # fmt: skip
def test_a_value_is_not_read_before_materialisation(model, read):
    with torch.no_grad(), pytest.raises(LazyInitError, match=REMEDY):
        read(model[1].weight)
    materialize(model)
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without CUDA")
def test_cuda_is_refused_on_a_machine_without_it():
    with pytest.raises(ValueError, match="'cuda' is not usable on this machine"):
        LazyInitContext(default_device="cuda")
    with LazyInitContext(), pytest.raises(ValueError, match="'cuda:0' is not usable on this machine"):
        nn.Linear(2, 2, device="cuda:0")
    with LazyInitContext(), pytest.raises(ValueError, match="'cuda' is not usable on this machine"):
        nn.Linear(2, 2).to("cuda")


def test_meta_is_refused_as_a_default_device_but_meta_tensors_stay_possible():
    with pytest.raises(ValueError, match="meta"):
        LazyInitContext(default_device="meta")
    with LazyInitContext(default_device="cpu"):
        assert torch.empty(3, device="meta").is_meta and torch.zeros_like(torch.empty(3, device="meta")).is_meta
        lazy = torch.empty(3)
    assert is_lazy(lazy) and lazy.device == torch.device("cpu")


def test_an_exception_inside_restores_torch():
    for depth in (1, 2):
        with pytest.raises(ZeroDivisionError):
            with LazyInitContext():
                torch.randn(3)
                if depth == 2:
                    with LazyInitContext(default_device="cpu"):
                        raise ZeroDivisionError
                raise ZeroDivisionError
        for tensor in (torch.empty(2), torch.randn(2), torch.tensor([1.0]), torch.zeros_like(torch.ones(2))):
            assert type(tensor) is torch.Tensor
        assert type(nn.Linear(2, 2).weight) is nn.Parameter
        assert not torch.overrides._get_current_function_mode_stack()
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_leaving_an_inner_context_does_not_leave_the_outer_one():
    with LazyInitContext():
        with LazyInitContext():
            pass
        assert is_lazy(torch.empty(1))
    assert not is_lazy(torch.empty(1))


def test_one_context_object_is_not_entered_twice_at_once_but_may_be_reused():
    context = LazyInitContext()
    with context, pytest.raises(RuntimeError, match="nest a new one"), context:
        pass
    with context:
        assert is_lazy(torch.empty(1))


def test_contexts_are_left_in_order():
    outer, inner = LazyInitContext(), LazyInitContext()
    with pytest.raises(RuntimeError, match="not entered"):
        outer.__exit__(None, None, None)
    with outer:
        with inner:
            with pytest.raises(RuntimeError, match="leave the inner LazyInitContext first"):
                outer.__exit__(None, None, None)
            assert is_lazy(torch.empty(1))
        assert is_lazy(torch.empty(1))
    assert not is_lazy(torch.empty(1))


class Subclass(torch.Tensor):
    pass


class OwnNew(nn.Parameter):
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data, True)


@pytest.mark.parametrize("make", [lambda: torch.randn(3).as_subclass(Subclass), lambda: OwnNew(torch.randn(3))])
def test_a_class_that_torch_gives_in_cpp_is_refused_with_the_way_out(make):
    with pytest.raises(LazyInitError, match="build this module outside of LazyInitContext"), LazyInitContext():
        make()
    assert not is_lazy(torch.empty(1))


def test_memory_that_is_not_there_is_not_shared(model):
    with pytest.raises(LazyInitError, match=REMEDY):
        model.share_memory()


def test_what_is_no_module_is_not_materialised():
    with pytest.raises(TypeError, match="a module or a tensor to materialise, got dict"):
        materialize({"weight": torch.ones(2)})


def test_a_gradient_that_is_lazy_is_refused(model):
    model[1].weight.grad = torch.zeros_like(model[1].weight)
    with pytest.raises(LazyInitError, match=r"set \.grad to None"):
        materialize(model)
    model[1].weight.grad = None
    materialize(model)


def test_a_backward_inside_is_refused_by_torch():
    with LazyInitContext():
        loss = nn.Linear(2, 2)(torch.ones(1, 2)).sum()
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss.backward()


def test_a_real_tensor_cannot_be_pointed_at_a_lazy_one():
    real = torch.ones(2)
    with LazyInitContext(), pytest.raises(LazyInitError, match=REMEDY):
        real.data = torch.zeros(2)


def test_a_lazy_parameter_is_not_used_inside_the_sink(model):
    with pytest.raises(LazyInitError, match="use the value instead"):
        materialize(model, lambda parameter, value: parameter.detach())


def test_real_tensors_made_before_stay_real_and_are_copied_when_they_meet_lazy_ones():
    real = torch.arange(4.0)
    with LazyInitContext():
        assert (real + 1).tolist() == [1, 2, 3, 4]
        linear = nn.Linear(4, 1, bias=False)
        linear.weight.data[0].copy_(real)
        real.mul_(10)
        with torch.no_grad():
            real.copy_(linear.weight[0] + 1)
    assert real.tolist() == [1, 2, 3, 4]
    materialize(linear)
    assert linear.weight.tolist() == [[0, 1, 2, 3]]


def test_the_public_names_are_these():
    assert gemini.lazy.__all__ == ["LazyInitContext", "is_lazy", "materialize", "seeds"]
