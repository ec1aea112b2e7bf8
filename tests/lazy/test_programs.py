"""Random initialisation programs: whatever sequence of ops, lazy gives what eager gives."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gemini.lazy import LazyInitContext, is_lazy, materialize

small = st.integers(0, 7)
step = st.tuples(st.integers(0, 23), small, small, small)


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
        actions: list[Any] = [
            lambda: a.normal_(0, k + 1.0),
            lambda: a.uniform_(generator=self.generator),
            lambda: a.view(-1)[k : k + 9].fill_(k),
            lambda: a.mul_(1.5).add_(k),
            lambda: a.copy_(b),
            lambda: a.reshape(-1)[k:].uniform_(),
            lambda: a.zero_(),
            lambda: self.pool.append(nn.Parameter(a.clone())),
            lambda: self.pool.append(nn.Parameter(a)),
            lambda: self.pool.append(a.detach()),
            lambda: self.pool.append(torch.randn(4, 6)),
            lambda: self.pool.append(a * 0.5 + b),
            lambda: self.pool.append(a.data.t().contiguous().view(4, 6)),
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
        ]
        actions[code]()


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(step, min_size=1, max_size=14), st.booleans())
def test_random_programs_give_what_eager_gives(steps, use_sink):
    torch.manual_seed(0)
    eager = Program(steps)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = Program(steps)
    delivered = []

    def sink(parameter, value):
        delivered.append(id(parameter))
        return value.clone()

    materialize(lazy, sink if use_sink else None)
    assert not use_sink or sorted(delivered) == sorted({id(p) for p in lazy.parameters()})
    assert torch.equal(torch.get_rng_state(), state)
    expected, got = eager.state_dict(), lazy.state_dict()
    assert list(expected) == list(got)
    for name in expected:
        assert not is_lazy(got[name])
        assert torch.equal(expected[name], got[name]), name
    if not use_sink:  # a sink decides itself about shared storages

        def shared(model):
            keys = [t.untyped_storage()._cdata for t in model.state_dict().values()]
            return [[i for i, other in enumerate(keys) if other == key] for key in keys]

        assert shared(eager) == shared(lazy)
