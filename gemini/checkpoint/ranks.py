"""Saving and loading with several ranks: the first one writes for all, and all load together."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gemini.chunk import Together, all_or_none
from gemini.chunk.communicator import Word

from ..boosted import Boosted
from ..step.managed_step import ChunkedStep
from .names import entries
from .tensor_parallel import write_by_first


def write_once(of: Any, doing: str, write: Callable[[], None]) -> None:
    """Have the first rank write files, and the others wait until it has.

    The first one may also write alone (``if rank == 0:``): it needs of the others what they have at home, and that
    they serve in any case. Ranks that share parameters as DTensors have to call this all: see `tensor_parallel`.

    Parameters
    ----------
    of
        The model, optimizer or scheduler that is saved.
    doing
        What this is, in words.

    Raises
    ------
    RankError
        On the others, if it fails on the first one, or that does not come to it within the timeout.
    """
    together = together_of(of)
    if together is None:
        write_by_first(of, doing, write, partial(_read, of))
        return
    communicator = together.communicator
    if communicator.rank:
        communicator.wait_until_finished(doing)
        return
    try:
        write_by_first(of, doing, write, partial(_read, of))
    except BaseException as error:
        communicator.finish(doing, f"{type(error).__name__}: {error}")
        raise
    communicator.finish(doing)


@contextmanager
def checked_by_all(of: Any, doing: str) -> Iterator[None]:
    """Look whether something can be loaded: if it cannot on one rank, nothing is loaded on any."""
    together = together_of(of)
    if together is None:
        yield
        return
    with all_or_none(together.communicator, f"the check of {doing}"):
        yield


@contextmanager
def loaded_by_all(of: Any, doing: str) -> Iterator[None]:
    """Load what has been checked, each rank its part. If it fails on one, all are told."""
    together = together_of(of)
    if together is None:
        yield
        return
    with all_or_none(together.communicator, f"the end of {doing}"), together.changing(doing):
        yield


def _read(of: nn.Module, name: str) -> None:
    next(entry for entry in entries(of) if entry.name == name).read()


def told_by_all(of: Any, doing: str, tell: Callable[[], Mapping[str, Word]]) -> list[dict[str, Any]]:
    """What each rank has to tell, in their order.

    Raises
    ------
    RankError
        If telling fails on another one.
    """
    together = together_of(of)
    if together is None:
        return [dict(tell())]
    words: list[Mapping[str, Word]] = []
    with all_or_none(together.communicator, doing):
        words.append(tell())
    return [dict(word) for word in together.communicator.agree(doing, words[0]) if isinstance(word, dict)]


def place_of(of: Any) -> tuple[int, int]:
    """The rank of this process among those that keep the model together, and their number."""
    together = together_of(of)
    if together is None:
        return 0, 1
    owner = together.communicator.owner
    return together.communicator.rank, owner.count * owner.replicas


def together_of(of: Any) -> Together | None:
    """Where several ranks keep the model together."""
    found = None
    if isinstance(of, nn.Module):
        boosted = of.__dict__.get("_gemini")
        found = boosted.manager.together if isinstance(boosted, Boosted) else None
    else:
        optimizer = of if isinstance(of, Optimizer) else getattr(of, "optimizer", None)
        step = getattr(optimizer, "_managed", None)
        found = step.manager.together if isinstance(step, ChunkedStep) else None
    return None if found is None or found.communicator.owner.is_alone else found
