"""The other side of a nursery: starts it, hands it trainings one by one, and ends it."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from child import QUIET_MALLOC
from outcome import Failure

from .cases import Case
from .models import USUAL, Size
from .nursery import Told

_HERE = Path(__file__).resolve()
_SECONDS = 120.0


class Keeper:
    """A nursery; each training is one call of `train`."""

    def __init__(self) -> None:
        paths = [str(_HERE.parents[1]), str(_HERE.parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, **QUIET_MALLOC, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_HERE.with_name("nursery.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._answer()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_SECONDS)

    def train(
        self,
        case: Case,
        kind: str,
        headroom: int | None,
        sabotage: str | None = None,
        size: Size = USUAL,
        seconds: float = _SECONDS,
    ) -> list[Told | str]:
        """Train a case as ``plain`` or ``ours``; what each rank told, or how it ended without a word.

        ``default`` is ours, told nothing but a folder.
        """
        processes = case.ranks if kind == "ours" else 1
        task = {
            "case": asdict(case),
            "size": asdict(size),
            "kind": kind,
            "headroom_bytes": headroom,
            "processes": processes,
            "port": _free_port() if processes > 1 else None,
            "seconds": seconds,
            "sabotage": sabotage,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return [each if isinstance(each, str) else Told.of(each) for each in self._answer()]

    def _answer(self) -> list[dict[str, object] | str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failure(f"the process that starts trainings ended with {self._process.wait()}")
        answer: list[dict[str, object] | str] = json.loads(line)
        return answer


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
