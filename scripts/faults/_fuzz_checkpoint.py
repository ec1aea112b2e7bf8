"""Mutated checkpoints of all kinds, loaded and judged as tests/gemini/checkpoint does."""

import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "gemini" / "checkpoint"))

from mutated_loads import BAD, SUBJECTS
from mutated_loads import Judge as JudgeOfOne

INPUTS_EACH = 60


class Judge:
    """One input after the other: some of one kind of checkpoint, then some of the next one."""

    def __init__(self, folder: Path, current: Path, rng: random.Random) -> None:
        self._rng, self._folder, self._current = rng, folder, current
        self._subjects = [subject for subject in SUBJECTS if subject.name != "adapter" or _has_peft()]
        self._tried = 0
        self._judge = self._next()

    def try_one(self) -> tuple[str, str, bool]:
        """What was done, what came of it, and whether that must not be."""
        if self._tried and self._tried % INPUTS_EACH == 0:
            self._judge = self._next()
        self._tried += 1
        what, outcome = self._judge.try_one()
        return what, outcome, outcome.startswith(BAD)

    def _next(self) -> JudgeOfOne:
        """All of them train the same model, and each compares with how it has found it: one at a time."""
        number = self._tried // INPUTS_EACH
        folder = self._folder / str(number % 2)
        shutil.rmtree(folder, ignore_errors=True)
        judge = JudgeOfOne(self._subjects[number % len(self._subjects)], folder, self._rng.randrange(1 << 30))
        self._current.unlink(missing_ok=True)
        self._current.symlink_to(judge.tried)
        return judge


def _has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True
