"""Files that ranks write together: the first one lists and commits them, those that have come to help write theirs.

A rank helps if it is at the same place of its program, waiting for the first one. Without helpers the first one writes
all (``if rank == 0:`` around a save is allowed): it reads from the others what they have at home.
"""

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gemini.chunk import Communicator
from gemini.chunk.communicator import Word

from .contents import Saving, write_all
from .ranks import together_of, write_once
from .shared_stage import SEEN, StageOfFirst
from .stage import Stage
from .tensor_parallel import is_divided

Listed = Callable[[Sequence[int]], Saving]
"""Lists files, divided among these ranks; on each of them the same."""


def write_together(of: Any, doing: str, listed: Listed) -> None:
    """Write files of a model, an optimizer or a scheduler, on as many ranks as have come.

    Parameters
    ----------
    doing
        What this is, in words.

    Raises
    ------
    RankError
        If it fails on another rank.
    """
    together = together_of(of)
    if together is None or is_divided(of):
        write_once(of, doing, lambda: listed((0,)).run())
        return
    communicator = together.communicator
    if communicator.rank:
        communicator.wait_until_finished(doing, partial(_help, communicator.rank, listed))
        return
    try:
        _lead(communicator, doing, listed)
    except BaseException as error:
        communicator.finish(doing, f"{type(error).__name__}: {error}")
        raise
    communicator.finish(doing)


def _lead(communicator: Communicator, doing: str, listed: Listed) -> None:
    helpers = communicator.helpers(doing)
    saving = listed((0, *helpers))
    if not helpers:
        saving.run()
        return
    with Stage(saving.folder, saving.stage_name) as stage:
        token = secrets.token_hex(8)
        stage.write_text(SEEN, token)
        task: dict[str, Word] = {"stage": str(stage.path), "token": token, "writers": [0, *helpers]}
        communicator.give_out(doing, task, helpers)
        write_all(stage, [content for content in saving.contents if content.rank == 0])
        communicator.take_back(doing, helpers)
        (stage.path / SEEN).unlink()
        saving.commit(stage)


def _help(rank: int, listed: Listed, task: Any) -> None:
    saving = listed(task["writers"])
    stage = StageOfFirst(Path(task["stage"]), saving.folder, task["token"])
    write_all(stage, [content for content in saving.contents if content.rank == rank])
