"""Saving and loading a learning rate scheduler."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from gemini.errors import CheckpointError

from ..formats import listed, shown
from .committed import refuse_committed
from .contents import Bytes, write_all
from .ranks import write_once
from .scheduler_state import state_faults
from .stage import Stage
from .torch_file import plain_bytes, read_torch


def save_lr_scheduler(lr_scheduler: LRScheduler, checkpoint: str | Path) -> None:
    """Write a scheduler's ``state_dict()`` as one file of ``torch.save``.

    Raises
    ------
    CheckpointError
        If the file cannot be written, or would not load again because it holds more than plain values.
    ValueError
        If it would be in a checkpoint that `booster.save` has committed.
    """
    path = Path(checkpoint).absolute()
    data = plain_bytes(lr_scheduler.state_dict(), f"{path}: the state of {type(lr_scheduler).__name__}")
    write_once(lr_scheduler, f"save_lr_scheduler to {path}", partial(_write, data, path))


def _write(data: bytes, path: Path) -> None:
    refuse_committed(path)
    with Stage(path.parent, path.name) as stage:
        write_all(stage, [Bytes(path.name, data)])
        stage.commit([path.name])


def load_lr_scheduler(lr_scheduler: LRScheduler, checkpoint: str | Path) -> None:
    """Read what `save_lr_scheduler` wrote. The learning rates themselves are in the optimizer's checkpoint.

    Raises
    ------
    CheckpointError
        If the file is not the state of such a scheduler. The scheduler is as it was.
    """
    checked_lr_scheduler(lr_scheduler, Path(checkpoint))()


def checked_lr_scheduler(lr_scheduler: LRScheduler, checkpoint: Path) -> Callable[[], None]:
    """Check all that `load_lr_scheduler` checks, and return what loads it."""
    state: Any = read_torch(checkpoint, mmap=False)
    if faults := list(state_faults(lr_scheduler, state)):
        raise CheckpointError(
            f"{checkpoint} is not the state of a {type(lr_scheduler).__name__}, which is as it was: "
            + listed(faults, "; ", width=300)
        )
    _try(lr_scheduler, state, checkpoint)
    return partial(lr_scheduler.load_state_dict, state)


def _try(lr_scheduler: Any, state: Any, path: Path) -> None:
    """Load a state into a copy first: a scheduler has rules of its own, and may find a value in the middle."""
    optimizer = getattr(lr_scheduler, "optimizer", None)
    try:
        scratch = copy.deepcopy(lr_scheduler, {id(optimizer): optimizer})
    except Exception:  # a user's scheduler may have what cannot be copied
        return
    try:
        scratch.load_state_dict(copy.deepcopy(state))
    except Exception as error:
        raise CheckpointError(
            f"{path} is not taken by the {type(lr_scheduler).__name__}, which is as it was: {shown(repr(error))}"
        ) from error
