"""Goes through accidents while a save is under way in the background. Arguments: a folder, and their names."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import boost
from torch import nn

from gemini.chunk.snapshot import Snapshot
from gemini.errors import ForkError
from gemini.process_wide import at_exit

SECONDS = 60.0
may_read, reading = threading.Event(), threading.Event()
read = Snapshot.read


def waiting(snapshot: Snapshot, *which: Any) -> torch.Tensor:
    reading.set()
    assert may_read.wait(SECONDS)
    return read(snapshot, *which)


def train(booster: Any, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
        booster.backward(model(inputs).float().square().sum(), optimizer)
        optimizer.step()
        optimizer.zero_grad()


def run(name: str, folder: Path) -> None:
    """Save a checkpoint twice at the same moment, the second time in the background with an accident."""
    may_read.clear()
    reading.clear()
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(32)))
    booster, model, optimizer = boost(layers, "bf16", folder / "disk" if name == "exit_disk" else None)
    train(booster, model, optimizer, range(2))
    booster.save(folder / name / "now", model=model, optimizer=optimizer)
    booster.save(folder / name / "later", model=model, optimizer=optimizer, use_async=True)
    assert reading.wait(SECONDS)
    if name != "exit_disk":  # where copies find no room
        train(booster, model, optimizer, range(2, 4))
    ACCIDENTS[name](booster, model, optimizer, folder / name / "later")


def exits(booster: Any, model: Any, optimizer: Any, folder: Path) -> None:
    threading.Timer(0.2, may_read.set).start()  # while the main thread has ended


def dropped(booster: Any, model: Any, optimizer: Any, folder: Path) -> None:
    del model, optimizer
    gc.collect()
    may_read.set()
    booster.wait_until_finished()


def killed(booster: Any, model: Any, optimizer: Any, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted(booster: Any, model: Any, optimizer: Any, folder: Path) -> None:
    try:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("nothing has interrupted it")
    except KeyboardInterrupt:
        train(booster, model, optimizer, range(4, 6))
        may_read.set()
        booster.wait_until_finished()


def interrupted_waiting(booster: Any, model: Any, optimizer: Any, folder: Path) -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        booster.wait_until_finished()
        raise AssertionError("nothing has interrupted it")
    except KeyboardInterrupt:
        may_read.set()
        train(booster, model, optimizer, range(4, 6))
        booster.wait_until_finished()


def forked(booster: Any, model: Any, optimizer: Any, folder: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(in_child(booster, model))
    assert os.waitpid(child, 0)[1] == 0
    may_read.set()
    booster.wait_until_finished()


def in_child(booster: Any, model: Any) -> int:
    """A child has no thread that writes: what it may not do raises, nothing waits. Returns what went wrong."""
    try:
        booster.wait_until_finished()
        return 1
    except ForkError:
        pass
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    except ForkError:
        pass
    return 0


def failed(booster: Any, model: Any, optimizer: Any, folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(folder.parent / "moved")
    may_read.set()


ACCIDENTS: dict[str, Callable[[Any, Any, Any, Path], None]] = {
    "dropped": dropped,
    "interrupted": interrupted,
    "interrupted_waiting": interrupted_waiting,
    "forked": forked,
    "exit": exits,
    "exit_disk": exits,
    "failed": failed,
    "killed": killed,
}


def main(folder: Path, *names: str) -> None:
    Snapshot.read = waiting  # type: ignore[method-assign]
    at_exit(lambda: print("the end"))
    for name in names:
        run(name, folder)


main(Path(sys.argv[1]), *sys.argv[2:])
