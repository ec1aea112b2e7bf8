"""Mutated files of a run, read by all commands of gemini-stat: they end with a code of theirs, and print plain text."""

import io
import json
import random
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "gemini" / "checkpoint"))

from hostile_runs import HOSTILE, KINDS, spoil
from mutations import BYTES, JSON, Mutation
from stat_runs import make_run

from gemini.stat.cli import main
from gemini.telemetry.layout import runs_folder

COMMANDS: tuple[list[str], ...] = (
    ["ls"], ["ls", "--json"], ["RUN", "-1"], ["RUN", "--json"], ["top", "RUN", "-1"], ["dmon", "RUN", "-c", "1"],
    ["dmon", "RUN", "-c", "1", "--json"], ["chunks", "RUN"], ["chunks", "RUN", "--json"], ["timeline", "RUN"],
    ["timeline", "RUN", "--csv"], ["timeline", "RUN", "--step", "peak"], ["export", "RUN"],
    ["export", "RUN", "--format", "csv"], ["export", "RUN", "--format", "prom"], ["lease"],
    ["export", "RUN", "--format", "perfetto"], ["check", "RUN", "--max-risk", "0.5"], ["report", "RUN", "-o", "r.html"],
    ["wait", "RUN", "--timeout", "0"],
)  # fmt: skip
CODES = (0, 2, 3, 4, 5, 6)


def hostile_text(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A text of the file, or a name in it, is one that would be code elsewhere."""
    lines = data.decode(errors="replace").split("\n")
    whole = [index for index, line in enumerate(lines) if line.startswith("{")]
    if not whole:
        return data
    at = rng.choice(whole)
    try:
        lines[at] = json.dumps(_with_text(rng, json.loads(lines[at])))
    except (ValueError, RecursionError):
        return data
    return "\n".join(lines).encode()


def _with_text(rng: random.Random, content: Any) -> Any:
    if isinstance(content, dict):
        return {key if rng.random() > 0.03 else HOSTILE: _with_text(rng, value) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_text(rng, value) for value in content]
    return HOSTILE if isinstance(content, str) and rng.random() < 0.3 else content


def other_numbers(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Digits are others, or many more."""
    places = [index for index, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return data
    at = rng.choice(places)
    number = rng.choice(("-1", "0", "1e308", "-1e999", "9" * 30, "9" * 4000, "NaN", "1e-320", "18446744073709551616"))
    return data[:at] + number.encode() + data[at + 1 :]


def of_lines(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Lines twice, in another order, or in one another."""
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines * rng.choice((1, 1, 2, 50)))


MUTATIONS: dict[str, Mutation] = {
    **BYTES, **JSON, "hostile text": hostile_text, "other numbers": other_numbers, "other lines": of_lines,
}  # fmt: skip


class Judge:
    """One input after the other: a run with one or two mutated files."""

    def __init__(self, folder: Path, current: Path, rng: random.Random) -> None:
        self._rng, self._current = rng, current
        self._good, self._other = folder / "good", folder / "other"
        shutil.move(make_run(), self._good)
        shutil.move(make_run(steps=3, status="crashed"), self._other)
        self._files = sorted(path.name for path in self._good.iterdir())

    def try_one(self) -> tuple[str, str, bool]:
        """What was done, what came of it, and whether that must not be."""
        rng, run = self._rng, self._current
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self._good, run)
        done = [self._spoil(run, rng.choice(self._files)) for _ in range(rng.choice((1, 1, 2)))]
        listed = runs_folder() / "20260101T000000Z-1"
        if not listed.is_symlink():
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.symlink_to(run)
        command = [str(run) if word == "RUN" else word for word in rng.choice(COMMANDS)]
        return f"{' '.join(command)}: {', '.join(done)}", *self._outcome(command)

    def _spoil(self, run: Path, name: str) -> str:
        path = run / name
        if self._rng.random() < 0.1:
            kind = self._rng.choice(list(KINDS))
            if path.is_dir():
                return f"{name}: nothing"
            spoil(path, kind)
            return f"{name}: {kind}"
        mutation = self._rng.choice(list(MUTATIONS))
        data, other = (self._good / name).read_bytes(), (self._other / name).read_bytes()
        if not data:
            return f"{name}: nothing"
        try:
            changed = MUTATIONS[mutation](self._rng, data, other)
        except (ValueError, IndexError, RecursionError):
            return f"{name}: nothing"  # a mutation of JSON on what is none
        if path.is_file():
            path.write_bytes(changed)
        return f"{name}: {mutation}"

    def _outcome(self, command: list[str]) -> tuple[str, bool]:
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code = main(command)
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:300]}", True
        if code not in CODES:
            return f"code {code}: {err.getvalue()[-300:]}", True
        text = out.getvalue() + err.getvalue()
        odd = sorted({char for char in text if not char.isprintable() and char not in "\n\r"})
        if odd:
            return f"characters that are no text: {odd}", True
        return f"code {code}", False
