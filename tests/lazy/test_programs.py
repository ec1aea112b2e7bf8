"""Random initialisation programs: for any ops and any order of materialisation, lazy gives what eager gives."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gemini.lazy import LazyInitContext, is_lazy, materialize

small = st.integers(0, 7)
ACTIONS = 38
programs = st.lists(st.tuples(st.integers(0, ACTIONS - 1), small, small, small), min_size=1, max_size=16)


class Program(nn.Module):
    """Runs coded steps over a growing list of tensors and registers all of them."""

    def __init__(self, steps: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        self.pool: list[torch.Tensor] = [nn.Parameter(torch.empty(4, 6).normal_()), torch.zeros(4, 6)]
        self.generator = torch.Generator().manual_seed(5)
        self.state = torch.get_rng_state()
        for code, i, j, k in steps:
            with torch.no_grad():
                self.run(code, self.pool[i % len(self.pool)], self.pool[j % len(self.pool)], k)
        for n, tensor in enumerate(self.pool):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"p{n}", tensor)
            else:
                self.register_buffer(f"b{n}", tensor)
        del self.generator

    def run(self, code: int, a: torch.Tensor, b: torch.Tensor, k: int) -> None:
        add = self.pool.append
        actions: list[Any] = [
            lambda: a.normal_(0, k + 1.0),
            lambda: a.uniform_(generator=self.generator),
            lambda: a.view(-1)[k : k + 9].fill_(k) if a.is_contiguous() else None,
            lambda: a.mul_(1.5).add_(k),
            lambda: a.copy_(b),
            lambda: a.reshape(-1)[k:].uniform_(),
            lambda: a.zero_(),
            lambda: add(nn.Parameter(a.clone())),
            lambda: add(nn.Parameter(a)),
            lambda: add(a.detach()),
            lambda: add(torch.randn(4, 6)),
            lambda: add(a * 0.5 + b),
            lambda: add(a.data.t().contiguous().view(4, 6)),
            lambda: setattr(a, "data", b.data),
            lambda: setattr(a, "data", a.data.clone()),
            lambda: torch.manual_seed(k),
            lambda: self.generator.manual_seed(k),
            lambda: torch.set_rng_state(self.state),
            lambda: setattr(self, "state", torch.get_rng_state()),
            lambda: a.add_(1) if a.sum().item() > k else b.normal_(),
            lambda: a[a > b].sum(),
            lambda: torch.bernoulli(torch.full((k + 1,), 0.5)),
            lambda: a.chunk(2)[k % 2].normal_(),
            lambda: a.copy_(torch.tensor(float(k)) + torch.rand(6)),
            lambda: add(copy.deepcopy(a)),
            lambda: setattr(self, "twins", copy.deepcopy([a, b])),
            lambda: add(nn.Parameter(a.to(torch.bfloat16).float(), requires_grad=bool(k % 2))),
            lambda: a.copy_(b.double().mul_(k / 3).half()),
            lambda: a.__setitem__(k % 4, b[0]),
            lambda: a.__setitem__((slice(None), torch.tensor([0, k % 6])), torch.randn(4, 2)),
            lambda: a[::2, 1:4].mul_(-1),
            lambda: add(torch.cat([a[:2], b[2:]])),
            lambda: add(torch.where(a > 0, a, b)),
            lambda: add(nn.Parameter(a.data.t().clone().t())),
            lambda: nn.init.trunc_normal_(a, std=k + 1.0),
            lambda: nn.init.orthogonal_(a),
            lambda: a.masked_fill_(b > 0, float(k)),
            lambda: add(torch.randperm(24).view(4, 6).float().add_(a.tolist()[0][0])),
        ]
        assert len(actions) == ACTIONS
        actions[code]()


def run_both(steps):
    torch.manual_seed(0)
    eager = Program(steps)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = Program(steps)
    return eager, state, lazy


def shared(tensors):
    keys = [tensor.untyped_storage()._cdata for tensor in tensors]
    return [[i for i, other in enumerate(keys) if other == key] for key in keys]


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs, st.booleans())
def test_random_programs_give_what_eager_gives(steps, use_sink):
    eager, state, lazy = run_both(steps)
    delivered = []

    def sink(parameter, value):
        delivered.append(id(parameter))
        return value.clone()

    materialize(lazy, sink if use_sink else None)
    assert len(delivered) == len(set(delivered))
    assert not use_sink or {id(p) for p in lazy.parameters()} <= set(delivered)
    assert torch.equal(torch.get_rng_state(), state)
    expected, got = eager.state_dict(), lazy.state_dict()
    assert list(expected) == list(got)
    for name in expected:
        assert not is_lazy(got[name])
        assert torch.equal(expected[name], got[name]), name
    if not use_sink:  # a sink decides itself about shared storages
        assert shared(eager.state_dict().values()) == shared(lazy.state_dict().values())


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs, st.integers(0, 10**6))
def test_random_programs_give_what_eager_gives_in_any_order_of_materialisation(steps, seed):
    eager, state, lazy = run_both(steps)
    rng = random.Random(seed)
    waiting = list({id(tensor): tensor for tensor in lazy.pool}.values())
    rng.shuffle(waiting)
    while waiting:
        part, waiting = waiting[: (count := rng.randint(1, 3))], waiting[count:]
        sink = rng.choice([None, lambda parameter, value: value.clone()])
        if len(part) == 1 and rng.random() < 0.5:
            assert materialize(part[0], sink) is part[0]
        else:
            holder = nn.Module()
            holder.kept = {"deep": [tuple(part)]}
            materialize(holder, sink)
        assert not any(map(is_lazy, part))
        if rng.random() < 0.3:
            torch.randn(3)  # somebody draws in between
            state = None
    assert state is None or torch.equal(torch.get_rng_state(), state)
    for i, (expected, got) in enumerate(zip(eager.pool, lazy.pool, strict=True)):
        assert torch.equal(expected, got), i
        assert (expected.dtype, expected.requires_grad, type(expected)) == (got.dtype, got.requires_grad, type(got)), i
