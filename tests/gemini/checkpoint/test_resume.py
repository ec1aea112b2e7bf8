"""Saved, loaded in another process and trained on, a run goes on bit for bit."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_same, boost, child, gpt2, train

from gemini.checkpoint import named_tensors
from gemini.updates.scaler import LossScaler


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    for part in ("first", "second"):  # with as many threads as here: a sum's last bits depend on how many share it
        child("child_resume.py", part, folder, torch.get_num_threads())
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("file", ["folder", "optimizer.pt"])
def test_training_goes_on_bit_for_bit_in_a_new_process_with_another_placement(
    saved: Path, precision: str, file: str
) -> None:
    booster, model, optimizer = boost(gpt2(), precision)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    expected = train(booster, model, optimizer, range(6), scheduler)[3:]

    name = precision if file == "folder" else file
    losses, weights, state = torch.load(saved / precision / f"from-{name}.result")
    assert losses == expected
    assert_same(weights, dict(named_tensors(model)))
    ours = optimizer.state_dict()
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
