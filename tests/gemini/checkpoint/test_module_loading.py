"""Hooks of the user's on ``load_state_dict``, and overrides, have the numbers of plain torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same, boost, values
from torch import nn

from gemini.errors import CheckpointError


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


class Hooked(Two):
    """The state dict has another name for a layer, and half of a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = 0
        self.register_state_dict_post_hook(self.rename)
        self.register_load_state_dict_pre_hook(self.rename_back)
        self.register_load_state_dict_post_hook(self.count)

    @staticmethod
    def rename(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        state[prefix + "other"] = state.pop(prefix + "a.bias")

    @staticmethod
    def rename_back(module: Any, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "a.bias"] = state.pop(prefix + "other") * 2

    @staticmethod
    def count(module: Any, incompatible: Any) -> None:
        module.loads += 1


class Migrated(Two):
    """Values that an older version saved are doubled."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") is None:
            for name in ("a.weight", "b.weight"):
                state[prefix + name] = state[prefix + name] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)
        with torch.no_grad():
            self.b.bias.zero_()


class Overridden(Two):
    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({**state, "a.bias": torch.full((4,), 7.0)}, strict)


def filled(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return build()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [Hooked, Migrated, Overridden])
def test_load_state_dict_has_the_numbers_of_torch(build: Any, precision: str) -> None:
    given, plain = filled(build).state_dict(), build()
    _, model, _ = boost(build(), precision)
    for state in (given, dict(given)):  # the second one says nothing of versions
        plain.load_state_dict(state)
        model.load_state_dict(state)
        assert_same(values(model), values(plain))
        assert getattr(model, "loads", 0) == getattr(plain, "loads", 0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
@pytest.mark.parametrize("build", [Hooked, Migrated, Overridden])
def test_files_load_with_the_numbers_of_torch(build: Any, name: str, tmp_path: Path) -> None:
    booster, model, _ = boost(filled(build))
    booster.save_model(model, tmp_path / name)
    plain, (booster, other, _) = build(), boost(build())
    plain.load_state_dict(model.state_dict())
    booster.load_model(other, tmp_path / name)
    assert_same(values(other), values(plain))


@pytest.mark.parametrize("build", [Hooked, Migrated, Overridden])
def test_a_checkpoint_loads_with_the_numbers_of_torch(build: Any, tmp_path: Path) -> None:
    booster, model, optimizer = boost(filled(build))
    booster.save(tmp_path, model=model, optimizer=optimizer)
    plain, (booster, other, optimizer) = build(), boost(build())
    plain.load_state_dict(model.state_dict())
    booster.load(tmp_path, model=other, optimizer=optimizer)
    assert_same(values(other), values(plain))


def test_a_hook_that_is_registered_after_boost_counts_too() -> None:
    given, plain, (_, model, _) = filled(Two).state_dict(), Two(), boost(Two())
    for each in (plain, model):
        each.a.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *rest: state.update({prefix + "bias": state[prefix + "bias"] * 3})
        )
        each.load_state_dict(given)
    assert_same(values(model), values(plain))


def test_what_does_not_fit_is_said_in_words_of_torch(tmp_path: Path) -> None:
    booster, model, _ = boost(Hooked())
    state = model.state_dict() | {"more": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"Unexpected key.*more.*\n.*the model .Hooked. has a hook"):
        model.load_state_dict(state)
    torch.save(state, tmp_path / "more.bin")
    with pytest.raises(CheckpointError, match=r"more.*(?s:.)*partly loaded"):
        booster.load_model(model, tmp_path / "more.bin")


def test_torchs_own_migrations_do_not_gather_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, _ = boost(nn.Sequential(nn.MultiheadAttention(4, 1), nn.BatchNorm1d(4)))
    monkeypatch.setattr("gemini.boosting.module.load_by_modules", None)
    assert not any(model.load_state_dict(model.state_dict()))


def test_a_distributed_checkpoint_is_refused_where_a_hook_would_be_passed_over(tmp_path: Path) -> None:
    booster, model, optimizer = boost(Hooked())
    booster.save(tmp_path, model=model, optimizer=optimizer, layout="dcp")
    with pytest.raises(CheckpointError, match=r"Hooked. has a hook on load_state_dict.*layout='hf'"):
        booster.load(tmp_path, model=model, optimizer=optimizer)
