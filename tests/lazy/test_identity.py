"""A parameter stays the same object, so whatever refers to it stays valid."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import nn

from gemini.lazy import LazyInitContext, is_lazy, materialize


def test_an_optimizer_built_on_lazy_parameters_trains_the_materialised_model():
    def train(model, optimizer):
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2))
    train(eager, torch.optim.AdamW(eager.parameters(), lr=0.1))
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(lazy.parameters(), lr=0.1)
    materialize(lazy)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in lazy.parameters()}
    train(lazy, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), lazy.parameters(), strict=True))


def test_weight_lists_of_recurrent_layers_stay_bound():
    with LazyInitContext():
        model = nn.LSTM(3, 4)
    materialize(model)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    model(torch.randn(2, 1, 3))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attributes_weak_references_and_hooks_stay_on_the_parameter():
    calls = []
    with LazyInitContext():
        model = nn.Linear(3, 3)
    model.weight.tag = {"shard": 1}
    reference = weakref.ref(model.weight)
    model.weight.register_hook(lambda grad: calls.append("grad"))
    model.bias.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    materialize(model)
    assert model.weight.tag == {"shard": 1} and reference() is model.weight
    model(torch.ones(1, 3)).sum().backward()
    assert sorted(calls) == ["accumulated", "grad"]


class Marked(nn.Parameter):
    pass


class Tagged(nn.Parameter):
    def __new__(cls, data, requires_grad=True, tag=None):
        self = super().__new__(cls, data, requires_grad)
        self.tag = tag
        return self


def test_subclasses_of_parameter_get_their_class_and_attributes_back():
    def build():
        net = nn.Module()
        net.marked, net.tagged = Marked(torch.randn(3)), Tagged(torch.randn(3), requires_grad=False, tag="shard 1")
        net.copied = copy.deepcopy(net.tagged)
        return net

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = build()
    assert all(isinstance(p, nn.Parameter) for p in (lazy.marked, lazy.tagged, lazy.copied))
    materialize(lazy)
    for name, parameter in eager.named_parameters():
        other = getattr(lazy, name)
        assert type(other) is type(parameter) and torch.equal(other, parameter), name
        assert other.requires_grad == parameter.requires_grad and vars(other) == vars(parameter), name


def test_a_forward_in_the_context_gives_uninitialised_parameters_their_shapes():
    def build(width):
        net = nn.Sequential(
            nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.Flatten(), nn.LazyLinear(8), nn.Linear(8, 8), nn.LazyLinear(3)
        )
        net(torch.randn(2, 2, width))
        return net.append(nn.Linear(3, 3))

    torch.manual_seed(0)
    eager = build(6)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = build(6)
    materialize(lazy)
    assert torch.equal(torch.rand(3), drawn)
    assert {type(p) for p in lazy.parameters()} == {nn.Parameter}
    for (name, a), (_, b) in zip(eager.state_dict().items(), lazy.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_running_statistics_that_a_forward_inside_the_context_writes_are_kept():
    def build(training):
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.BatchNorm1d(3, affine=False))
        net.train(training)
        with torch.no_grad():
            net[:2](torch.randn(4, 3))
            net[3](torch.randn(4, 3))
        return net

    for training in (True, False):
        torch.manual_seed(0)
        eager = build(training)
        torch.manual_seed(0)
        with LazyInitContext():
            lazy = build(training)
        materialize(lazy)
        for (name, a), (_, b) in zip(eager.state_dict().items(), lazy.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


def test_uninitialised_parameters_stay_so_until_their_first_forward():
    def build():
        net = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
        return net

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = build()
    materialize(lazy)
    assert isinstance(lazy[1].weight, nn.UninitializedParameter)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    expected = eager(x)
    torch.manual_seed(2)
    assert torch.equal(expected, lazy(x))
    for (name, a), (_, b) in zip(eager.state_dict().items(), lazy.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_gradient_set_before_stays():
    with LazyInitContext():
        model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    materialize(model)
    assert torch.equal(model.weight.grad, torch.ones(2, 2)) and model.bias.grad is None


def test_a_lazy_parameter_reports_what_it_will_be():
    with LazyInitContext():
        model = nn.Conv2d(2, 4, 3, dtype=torch.float64)
    weight = model.weight
    assert is_lazy(weight) and isinstance(weight, nn.Parameter) and weight.requires_grad and weight.is_leaf
    assert (tuple(weight.shape), weight.stride()) == ((4, 2, 3, 3), (18, 9, 3, 1))
    assert (weight.dtype, weight.device, weight.is_meta) == (torch.float64, torch.device("cpu"), False)
    assert (weight.numel(), weight.element_size(), weight.untyped_storage().nbytes()) == (72, 8, 576)
    assert repr(weight) == "LazyParameter(shape=(4, 2, 3, 3), dtype=torch.float64, device=cpu)"
    assert is_lazy(model.state_dict()["weight"])
    assert not is_lazy(torch.ones(2)) and not is_lazy(None)


def test_a_model_without_lazy_tensors_is_left_alone():
    model = nn.Linear(3, 3)
    state = torch.get_rng_state()
    weight = model.weight.clone()
    assert LazyInitContext.materialize(model) is model and materialize(model) is model
    assert torch.equal(model.weight, weight) and torch.equal(torch.get_rng_state(), state)
