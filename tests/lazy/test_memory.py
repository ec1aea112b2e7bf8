"""Memory of a replay is used again, but never while somebody needs it."""

from __future__ import annotations

import torch
from torch import nn

from gemini.lazy import LazyInitContext, materialize
from gemini.lazy.memory import Pool
from gemini.lazy.tape import Storage, describe

MIB = 1 << 20


def value(nbytes: int, shape=None):
    meta = torch.empty(shape or (nbytes // 4,), device="meta")
    return describe(meta, Storage(nbytes), torch.device("cpu"), 0, 0)


def test_memory_is_used_again_when_its_last_tensor_is_gone():
    pool = Pool()
    first = pool.empty(value(2 * MIB))
    view, address = first[5:], first.data_ptr()
    del first
    second = pool.empty(value(2 * MIB))
    assert second.data_ptr() != address, "a view of the first is alive"
    second.fill_(1)
    view.fill_(2)
    assert second.eq(1).all()
    del view
    assert pool.empty(value(MIB)).data_ptr() == address


def test_a_small_value_does_not_hold_a_large_map_and_not_much_is_kept():
    pool = Pool()
    large = pool.empty(value(40 * MIB))
    address = large.data_ptr()
    del large
    assert pool.empty(value(MIB)).data_ptr() != address
    several = [pool.empty(value(30 * MIB)) for _ in range(4)]
    several.clear()
    assert sum(map(len, pool._free)) <= 64 * MIB
    pool.empty(value(65 * MIB))
    assert sum(map(len, pool._free)) == 0


def test_geometry_is_that_of_the_value():
    transposed = describe(torch.empty(400, 300, device="meta").t(), Storage(480000), torch.device("cpu"), 0, 0)
    for wanted in (transposed, value(4), value(0)):
        tensor = Pool().empty(wanted)
        assert (tuple(tensor.shape), tensor.stride(), tensor.dtype) == (wanted.shape, wanted.stride, wanted.dtype)


class Related(nn.Module):
    """Large parameters that are made from each other, so that several are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(400, 300).normal_())
        self.b = nn.Parameter(torch.empty(300, 400).uniform_())
        self.c = nn.Parameter(self.a.data.clone())
        with torch.no_grad():
            self.a.add_(self.b.t()).mul_(3)
            self.b.copy_(self.c.t() - self.b)
            self.c[:100].normal_()
        self.d = nn.Parameter(torch.empty(400, 300).copy_(self.c.data * 2))


def test_large_values_that_are_alive_together_do_not_share_memory():
    torch.manual_seed(0)
    eager = Related()
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = Related()
    materialize(lazy, lambda parameter, value: value.clone())
    for (name, expected), (_, got) in zip(eager.named_parameters(), lazy.named_parameters(), strict=True):
        assert torch.equal(expected, got), name
