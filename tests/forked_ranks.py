"""Ranks as processes that end, crash or are killed, forked from one that has imported everything.

A rank is there in a moment, is alone with what it breaks, and ends as a program does: threads are waited for, and calls
at exit made. The interpreter is taken down where a test asks for it: that touches all that was imported. ::

    tests --program, number of ranks--> starter --fork--> ranks
          <--how each has ended-------          <--wait--
"""

import atexit
import faulthandler
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).parents[1]
SECONDS = 30.0
"""How long ranks may take to come to an end, whatever happens to them."""
TIMEOUT_SECONDS = 5.0
"""That of the process group."""
GRACE_SECONDS = 30.0
_LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class Ended:
    """How a rank has ended."""

    status: int | None
    """Its exit code; a signal's number, negative; None if it did not end in time, or was stopped when others ended."""
    seconds: float
    """How long that took."""
    value: Any
    """What its program returned; None if it did not come so far."""
    log: str

    @property
    def is_well(self) -> bool:
        return self.status == 0


class Starter:
    """The process from which ranks are forked."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self, program: Callable[..., Any], folder: Path, *, size: int = 2, timeout: float = TIMEOUT_SECONDS,
        seconds: float = SECONDS, takes_down: bool = False, **arguments: Any,
    ) -> list[Ended]:  # fmt: skip
        """Run ``program(rank, **arguments)``, a function at the top of a module, on each rank, within ``folder``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (folder / "task").write_bytes(pickle.dumps((program, arguments)))
        task = {
            "folder": str(folder),
            "size": size,
            "timeout": timeout,
            "seconds": seconds,
            "port": port,
            "takes_down": takes_down,
        }
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        return [_ended(folder, rank, *each) for rank, each in enumerate(ended)]

    def end(self) -> None:
        self._process.communicate(timeout=GRACE_SECONDS)


def _ended(folder: Path, rank: int, status: int | None, seconds: float) -> Ended:
    returned = folder / f"{rank}.value"
    value = torch.load(returned, weights_only=False) if returned.exists() else None
    return Ended(status, seconds, value, (folder / f"{rank}.log").read_text(errors="replace"))


@cache
def starter() -> Starter:
    """That of this test run; it ends with it, at the end of its input."""
    return Starter()


# -- in the starter


def _serve() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        begin = time.monotonic()
        pids: list[int] = []
        for rank in range(task["size"]):
            pid = os.fork()
            if pid == 0:
                if not task["takes_down"]:
                    _exit(partial(_be, rank, task))
                _be(rank, task)
                return
            pids.append(pid)
        print(json.dumps(_wait(pids, begin, begin + task["seconds"])), flush=True)


def _wait(pids: list[int], begin: float, deadline: float) -> list[tuple[int | None, float]]:
    ended: dict[int, tuple[int | None, float]] = {}
    stopped: set[int] = set()
    while len(ended) < len(pids):
        is_late = time.monotonic() > deadline or len(ended) + len(stopped) == len(pids)
        for pid in pids:
            if pid in ended:
                continue
            if is_late:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, 0 if is_late else os.WNOHANG | os.WUNTRACED)
            if found and os.WIFSTOPPED(status):
                stopped.add(pid)
            elif found:
                ended[pid] = (None if is_late else os.waitstatus_to_exitcode(status), time.monotonic() - begin)
        time.sleep(_LOOK_SECONDS)
    return [ended[pid] for pid in pids]


def _be(rank: int, task: dict[str, Any]) -> None:
    folder = Path(task["folder"])
    log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir(folder)
    faulthandler.enable()
    faulthandler.dump_traceback_later(task["seconds"] - 2, exit=False)
    size, address = str(task["size"]), ("127.0.0.1", str(task["port"]))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=address[1], XDG_STATE_HOME=str(folder / "state"))
    program, arguments = pickle.loads((folder / "task").read_bytes())
    import gemini

    gemini.launch_from_torch(timeout=task["timeout"])
    value = program(rank, **arguments)
    torch.save(value, folder / f"{rank}.value.part")
    os.replace(folder / f"{rank}.value.part", folder / f"{rank}.value")


def _exit(work: Callable[[], None]) -> NoReturn:
    """Do some work and end as a program does, up to where the interpreter is taken down."""
    status: int | str | None = 0
    try:
        work()
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        status, sys.last_value = 1, error
        sys.excepthook(type(error), error, error.__traceback__)
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(status, str) else status or 0)


def _get_ready() -> None:
    """Import what ranks import, and compile what they compute with; its thread idles, and each rank starts its own."""
    import rank_programs  # noqa: F401

    from gemini.nn.optimizer import HybridAdam
    from gemini.nn.optimizer.rules.adam_rule import ADAM
    from gemini.nn.optimizer.rules.rules import OneRule
    from gemini.updates.update_queue import warm_up

    optimizer = HybridAdam([torch.nn.Parameter(torch.zeros(1))])
    warm_up(OneRule(ADAM), optimizer.param_groups, torch.device("cpu"), torch.float32, False)


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if entry != str(ROOT / "tests")] + [str(ROOT / "tests")]
    _get_ready()
    _serve()
