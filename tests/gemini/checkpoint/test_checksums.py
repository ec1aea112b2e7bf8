"""Checksums of tensors: written always, compared before anything changes."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same, boost, mixed, values
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from gemini.checkpoint import load_model, save_model
from gemini.checkpoint.safetensors_stream import SafetensorsFile
from gemini.errors import CheckpointError


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_flipped_bit_is_named_and_the_model_stays(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_model(mixed(), tmp_path)
    _, model, _ = boost(mixed(seed=1))
    before, rng = values(model), random.Random(0)
    whole = file.read_bytes()
    for _ in range(20):
        file.write_bytes(whole)
        flip(file, rng.randrange(data_start(file), len(whole)))
        with pytest.raises(CheckpointError, match=rf"{file} is damaged: .* other bytes than were saved"):
            load_model(model, tmp_path)
        assert_same(model.state_dict(), before)
    load_model(model, tmp_path, verify=False)


def test_damage_in_the_last_shard_is_found_before_the_first_is_loaded(tmp_path: Path) -> None:
    save_model(mixed(), tmp_path, shard=True, size_per_shard="200B")
    last = max(tmp_path.glob("*.safetensors"))
    flip(last, last.stat().st_size - 1)
    model = mixed(seed=1)
    before = values(model)
    with pytest.raises(CheckpointError, match=last.name):
        load_model(model, tmp_path)
    assert_same(model.state_dict(), before)


def test_a_flipped_bit_of_an_optimizer_is_named_and_it_stays(tmp_path: Path) -> None:
    booster, model, optimizer = boost(mixed())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    booster.save_optimizer(optimizer, tmp_path)
    before = optimizer.state_dict()["state"]
    flip(tmp_path / "optimizer.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged: \d+\.exp_avg"):
        booster.load_optimizer(optimizer, tmp_path)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][name], before[i][name]) for i in before for name in before[i])
    booster.load_optimizer(optimizer, tmp_path, verify=False)


def test_files_of_safetensors_have_no_checksums_and_load(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    other = nn.Linear(4, 3)
    load_model(other, tmp_path / "x.safetensors")
    assert_same(other.state_dict(), model.state_dict())


def test_a_file_that_another_program_wrote_with_our_metadata_says_what_to_do(tmp_path: Path) -> None:
    save_model(nn.Linear(4, 3), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    tensors = {name: value * 2 for name, value in load_file(tmp_path / "x.safetensors").items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="remove the metadata that begin with gemini_memory"):
        load_model(nn.Linear(4, 3), tmp_path / "x.safetensors")


def test_a_file_that_changes_after_it_was_verified_says_so(tmp_path: Path, monkeypatch) -> None:
    save_model(mixed(), tmp_path / "x.safetensors")
    verify = SafetensorsFile.verify

    def verify_and_touch(file: SafetensorsFile, *tell: Any) -> None:
        verify(file, *tell)
        os.utime(file.path, ns=(1, 1))

    monkeypatch.setattr(SafetensorsFile, "verify", verify_and_touch)
    with pytest.raises(CheckpointError, match=r"was changed by another program .* partly loaded"):
        load_model(mixed(seed=1), tmp_path / "x.safetensors")


def test_messages_about_very_many_names_are_short(tmp_path: Path) -> None:
    tensors = {f"unexpected.{i}": torch.zeros(0) for i in range(20_000)}
    save_file({**tensors, "weight": torch.zeros(7)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected \(20000\): .* and 19992 more") as caught:
        load_model(nn.Linear(4, 3), tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 1000
