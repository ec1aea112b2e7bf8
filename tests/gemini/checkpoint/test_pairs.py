"""A model and an optimizer of different states are not loaded together without being asked for."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same, boost, values
from torch import nn

from gemini.errors import CheckpointError

FORMS = ["folder", "sharded", "file", "torch"]


def small(seed: int = 0) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    return boost(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


def step(booster: Any, model: Any, optimizer: Any) -> None:
    booster.backward(model(torch.ones(2, 8)).square().sum(), optimizer)
    optimizer.step()
    optimizer.zero_grad()


def save(booster: Any, model: Any, optimizer: Any, folder: Path, form: str) -> tuple[Path, Path]:
    files = {"file": ("m.safetensors", "optimizer"), "torch": ("m.pt", "o.pt")}.get(form, ("all", "all"))
    options = {"shard": True, "size_per_shard": "400B"} if form == "sharded" else {}
    booster.save_model(model, folder / files[0], **options)
    booster.save_optimizer(optimizer, folder / files[1], **options)
    return folder / files[0], folder / files[1]


@pytest.mark.parametrize("form", FORMS)
def test_a_model_and_an_optimizer_of_different_steps_are_refused(tmp_path: Path, form: str) -> None:
    booster, model, optimizer = small()
    saved = []
    for number in range(2):
        step(booster, model, optimizer)
        saved.append(save(booster, model, optimizer, tmp_path / str(number), form))
    (model_0, optimizer_0), (model_1, optimizer_1) = saved
    expected = optimizer.state_dict()["state"]

    booster, model, optimizer = small(seed=1)
    booster.load_model(model, model_0)
    with pytest.raises(CheckpointError, match="another state of training than the model loaded before it"):
        booster.load_optimizer(optimizer, optimizer_1)
    assert optimizer.state_dict()["state"] == {}
    booster.load_optimizer(optimizer, optimizer_0)
    booster.load_optimizer(optimizer, optimizer_1)
    before = values(model)
    with pytest.raises(CheckpointError, match="another state of training than the optimizer loaded before it"):
        booster.load_model(model, model_0)
    assert_same(values(model), before)
    booster.load_model(model, model_0, strict=False)
    booster.load_model(model, model_1)
    booster.load_optimizer(optimizer, optimizer_0, strict=False)
    booster.load_model(model, model_1)
    booster.load_optimizer(optimizer, optimizer_1)
    for index, state in optimizer.state_dict()["state"].items():
        assert_same(state, expected[index])


def test_a_step_or_other_values_in_between_end_the_wait_for_the_other_half(tmp_path: Path) -> None:
    booster, model, optimizer = small()
    first = save(booster, model, optimizer, tmp_path / "0", "folder")
    step(booster, model, optimizer)
    second = save(booster, model, optimizer, tmp_path / "1", "folder")
    booster.load_model(model, first[0])
    step(booster, model, optimizer)
    booster.load_optimizer(optimizer, second[1])
    step(booster, model, optimizer)
    booster.load_model(model, first[0])
    model.load_state_dict(model.state_dict())
    booster.load_optimizer(optimizer, second[1])
    optimizer.load_state_dict(optimizer.state_dict())
    booster.load_model(model, first[0])


def test_each_state_has_an_id_of_its_own_and_its_files_say_so(tmp_path: Path) -> None:
    booster, model, optimizer = small()
    state_id = model._gemini.step.state_id
    found = [state_id.text]
    step(booster, model, optimizer)
    found.append(state_id.text)
    paths = save(booster, model, optimizer, tmp_path, "folder")
    booster.load_model(model, paths[0])
    found.append(state_id.text)
    booster.load_optimizer(optimizer, paths[1])
    found += [state_id.text, small()[1]._gemini.step.state_id.text]
    assert len(set(found)) == len(found)
    path = booster.save(tmp_path / "all", model=model, optimizer=optimizer)
    for name in ("model.safetensors", "optimizer.safetensors", "optimizer.json"):
        assert found[3].encode() in (path / name).read_bytes()


def test_shards_of_different_saves_are_refused(tmp_path: Path) -> None:
    booster, model, optimizer = small()
    for number in range(2):
        step(booster, model, optimizer)
        save(booster, model, optimizer, tmp_path / str(number), "sharded")
    first = next((tmp_path / "0" / "all").glob("model-00001-of-*.safetensors"))
    shutil.copy(first, tmp_path / "1" / "all")
    before = values(model)
    with pytest.raises(CheckpointError, match="are not of the same save"):
        booster.load_model(model, tmp_path / "1" / "all")
    assert_same(values(model), before)
    booster.load_model(model, tmp_path / "1" / "all", strict=False)


def test_files_without_an_id_go_with_any(tmp_path: Path) -> None:
    booster, model, optimizer = small()
    step(booster, model, optimizer)
    save(booster, model, optimizer, tmp_path, "folder")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    booster.load_optimizer(optimizer, tmp_path / "all")
    booster.load_model(model, tmp_path / "plain.pt")
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    booster.load_model(plain, tmp_path / "all")
    assert_same(plain.state_dict(), values(model))


def test_a_checkpoint_of_parts_that_were_exchanged_is_refused(tmp_path: Path) -> None:
    booster, model, optimizer = small()
    paths = []
    for _ in range(2):
        step(booster, model, optimizer)
        paths.append(booster.save(tmp_path, model=model, optimizer=optimizer))
    for path in paths[0].glob("optimizer*"):
        shutil.copy(path, paths[1])
    before = values(model)
    for verify, words in ((True, "has the checksum"), (False, "another state of training than")):
        with pytest.raises(CheckpointError, match=words):
            booster.load(tmp_path, model=model, optimizer=optimizer, verify=verify)
    assert_same(values(model), before)


def test_what_was_saved_since_the_other_half_was_loaded_goes_with_it(tmp_path: Path) -> None:
    booster, model, optimizer = small()
    step(booster, model, optimizer)
    booster.save_model(model, tmp_path)
    booster.load_model(model, tmp_path)
    booster.save_optimizer(optimizer, tmp_path)  # its id is another than that of the model's file
    booster.load_optimizer(optimizer, tmp_path)
