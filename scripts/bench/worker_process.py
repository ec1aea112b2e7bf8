"""A process that a benchmark drives: a line in, a line of JSON out."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

END_SECONDS = 60


class WorkerError(Exception):
    """The process ended; the text is what it said last."""


class WorkerProcess:
    """The process, which answers once before it is asked anything.

    Parameters
    ----------
    command, environment
        Of the process.
    log
        File for what it prints beside its answers.

    Raises
    ------
    WorkerError
        If it ends, here and in `ask`.
    """

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.first = self._answer()
        """Its first answer."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: str = "") -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerError(self._said()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._said())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _said(self) -> str:
        self._process.wait(END_SECONDS)
        self._log.seek(0)
        return f"its process ended with {self._process.returncode}: {self._log.read().strip()[-1500:]}"

    def close(self) -> None:
        """Have it end, by itself if it can."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_SECONDS)
        self._process.stdout.close()
        self._log.close()
