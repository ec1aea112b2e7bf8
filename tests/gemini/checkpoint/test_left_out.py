"""A parameter that ``state_dict()`` of a model leaves out is missed by a strict load and not forgotten by a save."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import boost
from torch import nn

from gemini.errors import CheckpointError


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(f"{prefix}a.weight", None)


class Leaves(nn.Module):
    """Of two layers ``state_dict()`` gives all but a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_state_dict_post_hook(_leave_out)


class Overrides(nn.Linear):
    """``state_dict()`` gives the weight alone."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name != "bias"}


@pytest.mark.parametrize(("build", "name"), [(Leaves, "a.weight"), (lambda: Overrides(4, 4), "bias")])
def test_a_strict_load_misses_what_state_dict_leaves_out(build: Any, name: str, tmp_path: Path) -> None:
    booster, model, _ = boost(build())
    booster.save_model(model, tmp_path)
    for load in (lambda: model.load_state_dict(model.state_dict()), lambda: booster.load_model(model, tmp_path)):
        with pytest.raises(CheckpointError, match=rf"missing \(1\): {name}"):
            load()
    assert model.load_state_dict(model.state_dict(), strict=False).missing_keys == [name]


def test_what_state_dict_leaves_out_loads_where_it_is_given() -> None:
    _, model, _ = boost(Leaves())
    values = {name: torch.full_like(value, 3) for name, value in nn.Module.state_dict(Leaves()).items()}
    values["a.weight"] = torch.full((4, 4), 2.0)
    assert not any(model.load_state_dict(values))
    assert torch.equal(model.a.weight, values["a.weight"])


@pytest.mark.parametrize("layout", ["hf", "dcp"])
def test_a_save_of_a_run_refuses_a_model_of_which_it_would_lose_weights(layout: str, tmp_path: Path) -> None:
    booster, model, optimizer = boost(Leaves())
    with pytest.raises(CheckpointError, match=r"leaves out \(1\): a.weight. Keep them there"):
        booster.save(tmp_path, model=model, optimizer=optimizer, layout=layout)
    assert not any(tmp_path.iterdir())
