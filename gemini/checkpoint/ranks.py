"""Saving and loading with several ranks: the first one writes for all, and all load together."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from gemini.chunk import ALONE, ChunkManager, Together, all_or_none
from gemini.chunk.communicator import Word
from gemini.chunk.extent import SOLE
from gemini.errors import RankError

from ..boosted import Boosted
from ..signals import uninterrupted
from ..step.managed_step import ChunkedStep
from .names import entries
from .swapped import refuse_swapped
from .tensor_parallel import row_of, write_by_first


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
    wait_for_saves(of)
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


@dataclass(frozen=True, slots=True)
class Crew:
    """All ranks that have a part of a model::

               row: other parts of the same tensors (tensor parallelism)
    column:   rank 0 --- rank 1
    the same    |          |
    chunks    rank 2 --- rank 3
    """

    column: Together | None
    """None: a single process keeps the chunks."""
    row: "dist.ProcessGroup | None"

    @classmethod
    def of(cls, of: Any) -> "Crew":
        """Those of a model, an optimizer or a scheduler."""
        return cls(together_of(of), row_of(of))

    @property
    def index(self) -> int:
        """The place of this rank in what `exchange` returns."""
        if self.column is None:
            return 0 if self.row is None else dist.get_rank(self.row)
        communicator, row = self.column.communicator, 0 if self.row is None else dist.get_rank(self.row)
        return row * communicator.owner.count * communicator.owner.replicas + communicator.rank

    @property
    def is_first(self) -> bool:
        """True on the one rank that does what is done once."""
        return self.is_first_of_row and (self.column is None or self.column.communicator.rank == 0)

    @property
    def is_first_of_row(self) -> bool:
        return self.row is None or dist.get_rank(self.row) == 0

    @property
    def is_first_replica(self) -> bool:
        """True if no rank before this one keeps the same extents."""
        return self.column is None or self.column.communicator.rank < self.column.communicator.owner.count

    @property
    def count(self) -> int:
        """How many ranks these are."""
        owner = SOLE if self.column is None else self.column.communicator.owner
        return owner.count * owner.replicas * (1 if self.row is None else dist.get_world_size(self.row))

    def exchange(self, doing: str, do: Callable[[], Word]) -> list[Any]:
        """Do something on each rank, and tell all what it has come to.

        Returns
        -------
        list
            What it returned on each rank, beginning with the first.

        Raises
        ------
        RankError
            If it failed on another rank, or one is gone, does not come in time, or does something else.
        """
        try:
            word = do()
        except BaseException as error:
            with suppress(RankError):  # one error is enough
                self._gather(doing, {"rank": _rank(), "failure": f"{type(error).__name__}: {error}", "word": None})
            raise
        said = self._gather(doing, {"rank": _rank(), "failure": "", "word": word})
        for each in said:
            if each["failure"]:
                raise RankError(f"rank {each['rank']} failed in {doing}: {each['failure']}")
        return [each["word"] for each in said]

    def _gather(self, doing: str, said: Mapping[str, Word]) -> list[Any]:
        communicator = ALONE if self.column is None else self.column.communicator
        if self.row is None:
            return list(communicator.agree(doing, said))
        words: list[Any] = []
        lost = ""
        try:
            words = list(communicator.agree(doing, said))
        except RankError as error:
            lost = str(error)
        of_row: list[Any] = [None] * dist.get_world_size(self.row)
        try:
            dist.all_gather_object(of_row, (words, lost), group=self.row)
        except RuntimeError as error:
            raise RankError(f"a rank of the tensor-parallel group is gone at {doing}: {error}") from error
        for _, why in of_row:
            if why:
                raise RankError(why)
        return [word for words, _ in of_row for word in words]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def checked_by_all(of: Any, doing: str) -> Iterator[None]:
    """Look whether something can be loaded: if it cannot on one rank, nothing is loaded on any.

    Raises
    ------
    RuntimeError
        While the parameters have the values of a running average.
    """
    wait_for_saves(of)
    together = together_of(of)
    if together is None:
        refuse_swapped(doing, of)
        yield
        return
    with all_or_none(together.communicator, f"the check of {doing}"):
        refuse_swapped(doing, of)
        yield


@contextmanager
def loaded_by_all(of: Any, doing: str) -> Iterator[None]:
    """Load what has been checked, each rank its part. If it fails on one, all are told.

    Ctrl-C waits until everything is loaded: half of a checkpoint would train on without a word.
    """
    together = together_of(of)
    with uninterrupted:
        if together is None:
            yield
            return
        with all_or_none(together.communicator, f"the end of {doing}"), together.changing(doing):
            yield


def _read(of: nn.Module, name: str) -> None:
    next(entry for entry in entries(of) if entry.name == name).read()


def wait_for_saves(*objects: Any) -> None:
    """Wait for saves of these models and optimizers in the background.

    Raises
    ------
    CheckpointError
        If one has failed, and nothing has raised that yet.
    """
    for manager in map(manager_of, objects):
        if manager is not None:
            manager.snapshots.wait()


def together_of(of: Any) -> Together | None:
    """Where several ranks keep the model together."""
    manager = manager_of(of)
    return None if manager is None or manager.together.communicator.owner.is_alone else manager.together


def manager_of(of: Any) -> ChunkManager | None:
    """The chunks of a boosted model, or those that an optimizer or its scheduler is for."""
    if isinstance(of, nn.Module):
        boosted = of.__dict__.get("_gemini")
        return boosted.manager if isinstance(boosted, Boosted) else None
    optimizer = of if isinstance(of, Optimizer) else getattr(of, "optimizer", None)
    step = getattr(optimizer, "_managed", None)
    return step.manager if isinstance(step, ChunkedStep) else None
