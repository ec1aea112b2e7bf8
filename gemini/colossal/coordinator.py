"""`DistCoordinator`: which process this is, and what one process does alone or first."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

_P = ParamSpec("_P")
_R = TypeVar("_R")


class DistCoordinator:
    """The processes of a training, as ``torch.distributed`` knows them.

    Without a process group this is rank 0 of 1, and nothing waits. Everything is looked up when it is asked for: a
    coordinator may be older than the process group, and any number of them say the same.

    Methods take a ``process_group`` to ask about instead of all processes; None means all.
    """

    @property
    def rank(self) -> int:
        """The number of this process among all."""
        return rank_of(None)

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return size_of(None)

    @property
    def local_rank(self) -> int:
        """The number of this process among those of its machine, which launchers put into ``LOCAL_RANK``.

        Raises
        ------
        RuntimeError
            If there are several processes and no ``LOCAL_RANK``.
        ValueError
            If that is no whole number.
        """
        told = os.environ.get("LOCAL_RANK")
        if told is not None:
            try:
                return int(told)
            except ValueError:
                raise ValueError(f"environment variable LOCAL_RANK must be a whole number, got {told!r}") from None
        if self.world_size > 1:
            raise RuntimeError(
                f"rank {self.rank} of {self.world_size} has no LOCAL_RANK in its environment: start the script with "
                "torchrun, or set it to the number of the process on its machine"
            )
        return 0

    def is_master(self, process_group: ProcessGroup | None = None) -> bool:
        """Whether this is rank 0."""
        return rank_of(process_group) == 0

    def is_node_master(self) -> bool:
        """Whether this is the first process of its machine. Raises as `local_rank` does."""
        return self.local_rank == 0

    def is_last_process(self, process_group: ProcessGroup | None = None) -> bool:
        """Whether this is the highest rank."""
        return rank_of(process_group) == size_of(process_group) - 1

    def print_on_master(self, msg: object, process_group: ProcessGroup | None = None) -> None:
        """Print on rank 0 alone."""
        if self.is_master(process_group):
            print(msg)

    def print_on_node_master(self, msg: object) -> None:
        """Print on the first process of each machine. Raises as `local_rank` does."""
        if self.is_node_master():
            print(msg)

    @contextmanager
    def priority_execution(self, executor_rank: int = 0, process_group: ProcessGroup | None = None) -> Iterator[None]:
        """Let one rank run the body before the others do, for example to download a data set once.

        The others wait for it also where its body raises. All ranks of the group have to come here.

        Raises
        ------
        ValueError
            If the group has no such rank.
        """
        size = size_of(process_group)
        if not 0 <= executor_rank < size:
            raise ValueError(f"executor_rank must be one of the ranks 0 to {size - 1}, got {executor_rank}")
        is_first = rank_of(process_group) == executor_rank
        if not is_first:
            self.block_all(process_group)
        try:
            yield
        finally:
            if is_first:
                self.block_all(process_group)

    def block_all(self, process_group: ProcessGroup | None = None) -> None:
        """Wait until all processes are here, at most for the timeout of the process group."""
        if dist.is_initialized():
            dist.barrier(group=process_group)

    def on_master_only(
        self, process_group: ProcessGroup | None = None
    ) -> Callable[[Callable[_P, _R]], Callable[_P, _R | None]]:
        """Decorate a function that only rank 0 is to run; on other ranks its calls return None."""

        def decorate(function: Callable[_P, _R]) -> Callable[_P, _R | None]:
            @functools.wraps(function)
            def on_master(*args: _P.args, **kwargs: _P.kwargs) -> _R | None:
                return function(*args, **kwargs) if self.is_master(process_group) else None

            return on_master

        return decorate

    def destroy(self, process_group: ProcessGroup | None = None) -> None:
        """End the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group(process_group)


def rank_of(group: ProcessGroup | None) -> int:
    """The number of this process in a group (None: among all), -1 if it is not in it; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: ProcessGroup | None) -> int:
    """-1 for a process that is not in the group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1
