"""One comparison for all lazy tests: the same function builds a model eagerly and lazily at the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from gemini.lazy import LazyInitContext, is_lazy, materialize

SEED = 1234
Build = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Every test leaves torch's global state as it found it."""
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype
    assert type(torch.empty(1)) is torch.Tensor


def build_eager(build: Build) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(SEED)
    model = build()
    return model, torch.get_rng_state()


def build_lazy(build: Build) -> nn.Module:
    torch.manual_seed(SEED)
    with LazyInitContext():
        return build()


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def groups(tensors: dict[str, torch.Tensor], key: Callable[[torch.Tensor], int]) -> set[frozenset[str]]:
    """Names that mean the same thing by `key`: the ties of a model."""
    found: dict[int, set[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(key(tensor), set()).add(name)
    return {frozenset(names) for names in found.values()}


def assert_same(eager: nn.Module, lazy: nn.Module) -> None:
    expected, got = named(eager), named(lazy)
    assert list(expected) == list(got)
    for name, tensor in expected.items():
        other = got[name]
        assert type(other) is type(tensor), name
        assert (other.dtype, other.device, other.stride()) == (tensor.dtype, tensor.device, tensor.stride()), name
        assert (other.requires_grad, other.is_leaf) == (tensor.requires_grad, tensor.is_leaf), name
        assert torch.equal(other, tensor), f"{name} differs"
    assert groups(expected, id) == groups(got, id)
    assert groups(expected, lambda t: t.untyped_storage()._cdata) == groups(got, lambda t: t.untyped_storage()._cdata)


@pytest.fixture
def assert_same_models() -> Callable[[nn.Module, nn.Module], None]:
    return assert_same


@pytest.fixture
def check_lazy_equals_eager() -> Callable[[Build], nn.Module]:
    """Build both ways, compare everything, return the materialised model."""

    def check(build: Build) -> nn.Module:
        eager, state = build_eager(build)
        lazy = build_lazy(build)
        before = list(lazy.parameters())
        assert before and all(is_lazy(parameter) for parameter in before), "the context made real parameters"
        assert materialize(lazy) is lazy
        assert_same(eager, lazy)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is not where eager left it"
        assert all(a is b for a, b in zip(before, lazy.parameters(), strict=True)), "parameters were replaced"
        return lazy

    return check
