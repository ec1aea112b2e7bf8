"""`booster.save` and `booster.load`: all of a training run as one committed checkpoint."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import assert_same, boost, values
from torch import nn

from gemini.errors import CheckpointError


def small(seed: int = 0, **options: Any) -> tuple[Any, ...]:
    """Booster, model, optimizer, scheduler and dataloader; the model draws random numbers, the order is shuffled."""
    torch.manual_seed(seed)
    booster, model, optimizer = boost(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8)), **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loader = booster.plugin.prepare_dataloader([torch.full((8,), float(i)) for i in range(20)], 2, shuffle=True)
    return booster, model, optimizer, scheduler, loader


def train(booster: Any, model: Any, optimizer: Any, scheduler: Any, batches: Any, steps: int) -> None:
    for _, batch in zip(range(steps), batches, strict=False):
        booster.backward(model(batch).square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_goes_on_in_the_middle_of_an_epoch_as_if_it_had_not_ended(tmp_path, precision: str) -> None:
    booster, model, optimizer, scheduler, loader = small(precision=precision)
    batches = iter(loader)
    train(booster, model, optimizer, scheduler, batches, 3)
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler, "dataloader": loader}
    booster.save(tmp_path, **parts)
    train(booster, model, optimizer, scheduler, batches, 3)
    drawn = (random.random(), np.random.rand(), torch.rand(3))

    booster, other, optimizer, scheduler, loader = small(seed=1, precision=precision)
    train(booster, other, optimizer, scheduler, loader, 1)
    booster.load(tmp_path, model=other, optimizer=optimizer, lr_scheduler=scheduler, dataloader=loader)
    train(booster, other, optimizer, scheduler, loader, 3)
    assert_same(values(other), values(model))
    assert (random.random(), np.random.rand()) == drawn[:2]
    assert torch.equal(torch.rand(3), drawn[2])


def test_what_is_given_as_extra_comes_back(tmp_path) -> None:
    booster, model, *_ = small()
    extra = {"epoch": 3, "best": 0.25, "names": ["a", ("b",)], "tensor": torch.arange(3), "none": None}
    path = booster.save(tmp_path / "new" / "folder", model=model, extra=extra)
    assert path == tmp_path / "new" / "folder" / "checkpoint-000001"
    into = {"epoch": 0, "mine": 1}
    found = booster.load(path, model=model, extra=into)
    assert into["mine"] == 1 and into["epoch"] == 3 and into.keys() == {"mine", *extra}
    assert torch.equal(found.pop("tensor"), extra.pop("tensor"))
    assert found == extra
    booster.save(tmp_path, model=model)
    assert booster.load(tmp_path) is None


def test_the_newest_ones_are_kept_and_numbers_only_grow(tmp_path) -> None:
    booster, model, *_ = small()
    for step in range(5):
        booster.save(tmp_path, model=model, extra=step, keep=2)
    assert names(tmp_path) == ["checkpoint-000004", "checkpoint-000005", "latest"]
    assert os.readlink(tmp_path / "latest") == "checkpoint-000005"
    assert booster.load(tmp_path) == booster.load(tmp_path / "latest") == 4
    assert booster.load(tmp_path / "checkpoint-000004") == 3
    booster.save(tmp_path, model=model, extra=5, keep=None)
    booster.save(tmp_path, model=model, extra=6, keep=1)
    assert names(tmp_path) == ["checkpoint-000007", "latest"]


def test_a_damaged_newest_checkpoint_is_an_error_that_names_the_whole_one(tmp_path) -> None:
    booster, model, optimizer, *_ = small()
    whole, damaged = (booster.save(tmp_path, model=model, optimizer=optimizer, extra=n) for n in range(2))
    before = values(model)
    data = bytearray((damaged / "optimizer.json").read_bytes())
    data[100] ^= 1
    (damaged / "optimizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer.json has the checksum .*checkpoint-000001 is whole"):
        booster.load(tmp_path, model=model, optimizer=optimizer)
    assert_same(values(model), before)
    assert booster.load(whole, model=model, optimizer=optimizer) == 0


def test_several_models_have_a_folder_each(tmp_path) -> None:
    booster, generator, optimizer, *_ = small()
    _, critic, other, *_ = small(seed=1)
    path = booster.save(
        tmp_path, model={"generator": generator, "critic": critic}, optimizer={"generator": optimizer, "critic": other}
    )
    assert {"generator", "critic"} <= set(names(path))
    expected = values(critic)
    _, critic, other, *_ = small(seed=2)
    booster.load(tmp_path, model={"critic": critic}, optimizer={"critic": other})
    assert_same(values(critic), expected)
    with pytest.raises(CheckpointError, match="has no model 'other'; it has model 'generator', model 'critic'"):
        booster.load(tmp_path, model={"other": critic})
    _, critic, *_ = small(seed=3)
    expected = values(critic)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        booster.load(tmp_path, model={"critic": critic, "generator": nn.Linear(8, 9)})
    assert_same(values(critic), expected)
