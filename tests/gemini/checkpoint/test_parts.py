"""A part of a boosted model gathers and loads its own state, wherever its chunks are."""

from typing import Any

import pytest
import torch
from loop import PLACEMENTS, SMALL, Trained, check_same
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.chunk import Tier


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_state_dict_of_a_part_is_that_of_the_whole(placement: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = Trained(PLACEMENTS[placement], precision="bf16")
    run.step(0)
    whole: dict[str, Tensor] = run.model.state_dict()
    parts = {f"{i}.{k}": v for i, part in enumerate(run.model) for k, v in part.state_dict().items()}
    assert parts.keys() == whole.keys()
    assert all(parts[name].dtype == torch.float32 and torch.equal(parts[name], whole[name]) for name in whole)


def test_a_part_loads_into_the_masters_and_training_goes_on_from_there() -> None:
    ours, plain = Trained({"device_memory": "24KiB", **SMALL}), Trained(None)
    values = {k: torch.randn_like(v) for k, v in plain.model[3].state_dict().items()}
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
        assert not any(run.model[3].load_state_dict(values))
        run.step(1)
    check_same(ours, plain)


def test_loading_a_part_keeps_what_the_compute_dtype_has_no_room_for() -> None:
    run = Trained({"device_memory": "24KiB", **SMALL}, precision="bf16")
    run.step(0)
    values = {k: torch.randn_like(v, dtype=torch.float32) for k, v in run.model[0].state_dict().items()}
    run.model[0].load_state_dict(values, assign=True)
    loaded = run.model.state_dict()
    assert all(torch.equal(loaded[f"0.{name}"], value) for name, value in values.items())
    manager = boosted(run.model).manager
    assert all(manager.find(p) is not None for p in run.model.parameters())
    assert not any(chunk.pins for chunk in manager.chunks)
    assert manager.ledger.used(Tier.DEVICE) <= manager.ledger.capacity(Tier.DEVICE)


def test_what_does_not_fit_is_reported_as_torch_does() -> None:
    ours, plain = Trained({"device_memory": "24KiB", **SMALL}), Trained(None)
    wrong = {"weight": torch.zeros(3, 3), "other": torch.zeros(1)}
    messages = []
    for run in (ours, plain):
        before = run.model.state_dict()
        with pytest.raises(RuntimeError) as error:
            run.model[0].load_state_dict(wrong)
        messages.append(str(error.value))
        after = run.model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert messages[0] == messages[1]
    assert not any(chunk.pins for chunk in boosted(ours.model).manager.chunks)


def test_a_part_inside_of_a_plain_module_gathers_too() -> None:
    run = Trained({"device_memory": "24KiB", **SMALL})
    run.step(0)
    holder = nn.ModuleDict({"first": run.model[0]})
    whole = run.model.state_dict()
    assert torch.equal(holder.state_dict()["first.weight"], whole["0.weight"])
