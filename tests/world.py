"""Ranks for tests: processes that form one process group once, and then run functions of test modules together.

::

    worlds(2) --> World --function and arguments--> rank 0, rank 1 (`world_rank.py`)
                        <--result or error of each--

``worlds`` is the fixture of ``tests/gemini/ranks``. A rank has one thread to compute on, and so must the run that it is
compared with: how many there are changes the last bits of matrix products. `World.run` on one rank is such a run.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import TracebackType
from typing import Any

CHILD = Path(__file__).with_name("world_rank.py")
ROOT = Path(__file__).parent.parent
GROUP_SECONDS = 30
"""Timeout of the process group, unless a test says otherwise."""
RUN_SECONDS = 120
"""How long a function may take on all ranks, unless a test says otherwise: the machine may be busy."""
START_SECONDS = 120
_DUMP_SECONDS = 2.0
_LOG_BYTES = 6000


class RankFailed(AssertionError):
    """A function that was to work raised on some rank; it says where and why."""


@dataclass(frozen=True)
class Outcome:
    """What came of a function on one rank."""

    value: Any = None
    error: str = ""
    """``"RankError: what it says"``; empty if the function returned."""
    details: str = ""
    """The traceback, or what a rank that died had written."""
    is_dead: bool = False
    """The process has ended, or has been killed since it did not come to an end."""


class World:
    """Rank processes that are joined in one process group.

    Parameters
    ----------
    size
        How many.
    group_seconds
        Timeout of the process group.
    """

    def __init__(self, size: int, group_seconds: float = GROUP_SECONDS) -> None:
        self._folder = TemporaryDirectory(prefix="world-")
        self._ranks = [_Rank(index, size, self._folder.name, group_seconds) for index in range(size)]
        self._has_joined = False

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def size(self) -> int:
        return len(self._ranks)

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    @property
    def is_whole(self) -> bool:
        """True if every rank lives."""
        return all(rank.process.poll() is None for rank in self._ranks)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = RUN_SECONDS) -> list[Any]:
        """Call a function on every rank at once. Returns what it returned on each.

        Parameters
        ----------
        function
            Of a module (no lambda, nothing local); ranks import that module by its file.
        args
            Anything that can be pickled.

        Raises
        ------
        RankFailed
            If it raised anywhere, or did not come to an end.
        """
        outcomes = self.outcomes(function, *args, seconds=seconds)
        failed = [f"rank {i}: {o.error}\n{o.details}" for i, o in enumerate(outcomes) if o.error]
        if failed:
            raise RankFailed("\n".join(failed))
        return [outcome.value for outcome in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any, seconds: float = RUN_SECONDS) -> list[Outcome]:
        """As `run`, for functions that may raise. Ranks that do not come to an end are killed."""
        return self.each([(function, args)] * self.size, seconds)

    def each(self, calls: Sequence[tuple[Callable[..., Any], Sequence[Any]]], seconds: float) -> list[Outcome]:
        """Have each rank call something of its own."""
        if not self._has_joined:
            self._gather(START_SECONDS)
            self._has_joined = True
        for rank, (function, args) in zip(self._ranks, calls, strict=True):
            rank.call(function, args)
        return self._gather(seconds)

    def _gather(self, seconds: float) -> list[Outcome]:
        """The next word of each rank."""
        deadline = time.monotonic() + seconds
        found: dict[_Rank, Outcome] = {}
        while len(found) < self.size:
            waiting = {rank.connection: rank for rank in self._ranks if rank not in found}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            found |= {waiting[connection]: waiting[connection].outcome() for connection in ready}  # type: ignore[index]
        late = [rank for rank in self._ranks if rank not in found]
        for rank in late:
            rank.process.send_signal(signal.SIGUSR1)  # it writes where its threads are
        if late:
            time.sleep(_DUMP_SECONDS)
        found |= {rank: rank.died(f"it did not come to an end within {seconds:g} s") for rank in late}
        return [found[rank] for rank in self._ranks]

    def close(self) -> None:
        """End all processes."""
        for rank in self._ranks:
            rank.close()
        self._folder.cleanup()


class _Rank:
    """One process, from outside."""

    def __init__(self, index: int, size: int, folder: str, group_seconds: float) -> None:
        self.connection: Connection
        self.connection, theirs = Pipe()
        self._log = TemporaryFile()
        numbers = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), str(theirs.fileno()), f"{folder}/store", str(group_seconds)],
            env={
                **os.environ,
                **{name: str(number) for name, number in numbers.items()},
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(CHILD.parent)]),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "HF_HUB_OFFLINE": "1",
                "XDG_STATE_HOME": folder,
            },
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        theirs.close()

    def call(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        module = sys.modules[function.__module__]
        try:
            # Not `Connection.send`, which has torch's tensors shared instead of sent.
            self.connection.send_bytes(pickle.dumps((module.__name__, module.__file__, pickle.dumps((function, args)))))
        except BrokenPipeError:
            pass  # it is dead, as `outcome` will say

    def outcome(self) -> Outcome:
        """What it has sent; it has, or is dead."""
        try:
            is_error, content, details = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return self.died("it died")
        return Outcome(error=content, details=details) if is_error else Outcome(content)

    def died(self, why: str) -> Outcome:
        self.process.kill()
        status = self.process.wait()
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")[-_LOG_BYTES:]
        return Outcome(error=f"{why} (status {status})", details=log, is_dead=True)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self._log.close()


class Worlds:
    """Keeps a world of each size for the tests of a session, and starts another where a test has broken one."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def __call__(self, size: int) -> World:
        world = self._worlds.pop(size, None)
        if world is not None and not world.is_whole:
            world.close()
            world = None
        self._worlds[size] = world = world or World(size)
        return world

    def close(self) -> None:
        """End all processes."""
        for world in self._worlds.values():
            world.close()
