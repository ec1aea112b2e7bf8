"""A save on one thread while another one trains is of one state, or is refused."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same, boost, values
from torch import nn

from gemini.checkpoint import dcp, prepared
from gemini.checkpoint.output import Output
from gemini.errors import CheckpointError

SAVES: dict[str, Callable[..., object]] = {
    "booster.save": lambda booster, model, optimizer, path: booster.save(path, model=model, optimizer=optimizer),
    "layout dcp": lambda booster, model, optimizer, path: booster.save(
        path, model=model, optimizer=optimizer, layout="dcp"
    ),
    "dcp.save": lambda booster, model, optimizer, path: dcp.save(path / "dcp", model, optimizer),
    "save_model": lambda booster, model, optimizer, path: booster.save_model(
        model, path, shard=True, size_per_shard="1B"
    ),
    "save_model to a file": lambda booster, model, optimizer, path: booster.save_model(model, path / "model.pt"),
    "save_optimizer": lambda booster, model, optimizer, path: booster.save_optimizer(optimizer, path),
}


def trained(seed: int = 0) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    booster, model, optimizer = boost(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    step(booster, model, optimizer)
    return booster, model, optimizer


def step(booster: Any, model: Any, optimizer: Any) -> None:
    booster.backward(model(torch.ones(2, 8)).square().sum(), optimizer)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("save", SAVES)
def test_a_save_in_which_a_step_is_taken_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: str
) -> None:
    booster, model, optimizer = trained()
    make_output = Output.__init__
    threads: list[threading.Thread] = []

    def training(*args: Any, **options: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=step, args=(booster, model, optimizer)))
            threads[0].start()
            threads[0].join(timeout=30)
        make_output(*args, **options)

    SAVES[save](booster, model, optimizer, tmp_path / "before")
    with monkeypatch.context() as patched:
        patched.setattr(Output, "__init__", training)
        with pytest.raises(CheckpointError, match="was trained, or loaded, by another thread while it was saved"):
            SAVES[save](booster, model, optimizer, tmp_path / "it")
    assert not threads[0].is_alive()
    assert not [path for path in (tmp_path / "it").rglob("*") if path.is_file()]
    SAVES[save](booster, model, optimizer, tmp_path / "it")


def test_a_save_in_the_background_is_of_one_state_while_another_thread_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    booster, model, optimizer = trained()
    list_optimizer, before = prepared.optimizer_contents, values(model)
    thread = threading.Thread(target=step, args=(booster, model, optimizer))

    def training(*args: Any) -> Any:
        thread.start()
        thread.join(timeout=0.1)  # it waits for the save
        return list_optimizer(*args)

    with monkeypatch.context() as patched:
        patched.setattr(prepared, "optimizer_contents", training)
        booster.save(tmp_path, model=model, optimizer=optimizer, use_async=True)
    thread.join(timeout=30)
    booster.wait_until_finished()
    booster, model, optimizer = trained(seed=1)
    booster.load(tmp_path, model=model, optimizer=optimizer)
    assert_same(values(model), before)
