"""Saved, loaded in another process and trained on, a run goes on bit for bit."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same, boost, child, gpt2
from resumed_runs import PRECISIONS, SOURCES, Run

from gemini.checkpoint import named_tensors
from gemini.chunk import MASTER, Tier
from gemini.updates.scaler import LossScaler


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where runs on disk were saved after three steps and gone on with, and what they came to after six."""
    folder, ended = tmp_path_factory.mktemp("resume"), {}
    for precision in PRECISIONS:
        run = Run(precision, disk=folder / "offload")
        homes = {chunk.homes[MASTER].tier for chunk in run.model._gemini.manager.chunks}
        assert Tier.DISK in homes and len(homes) > 1, homes  # a test of less otherwise
        run.train(3)
        run.save(folder / precision)
        losses = run.train(3)
        ended[precision] = (losses, dict(named_tensors(run.model)), run.optimizer.state_dict(), torch.rand(2))
    child("child_resume.py", folder, torch.get_num_threads())  # a sum's last bits depend on how many threads share it
    return folder, ended


@pytest.mark.one_in(3)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("source", SOURCES)
def test_training_goes_on_bit_for_bit_in_a_new_process_with_another_placement(
    runs: tuple[Path, dict[str, Any]], precision: str, source: str
) -> None:
    folder, ended = runs
    expected, weights, ours, drawn = ended[precision]
    losses, found, state, draws = torch.load(folder / precision / f"from-{source}.result")
    assert losses == expected
    assert torch.equal(draws, drawn)
    assert_same(found, weights)
    assert state["param_groups"] == ours["param_groups"]
    assert state["state"].keys() == ours["state"].keys()
    for index, values in ours["state"].items():
        assert_same(state["state"][index], values)


def test_the_loss_scale_is_where_it_was(tmp_path: Path) -> None:
    booster, model, optimizer = boost(gpt2(), "fp16")
    optimizer._managed.scaling.scaler.load_state_dict(
        {**asdict(LossScaler()), "scale": 512.0, "good_steps": 7, "overflows": 1}
    )
    for checkpoint in (tmp_path / "folder", tmp_path / "optimizer.pt"):
        booster.save_optimizer(optimizer, checkpoint)
        other_booster, _, other = boost(gpt2(), "fp16")
        other_booster.load_optimizer(other, checkpoint)
        assert other._managed.scaling.scaler == optimizer._managed.scaling.scaler
    assert model is not None
