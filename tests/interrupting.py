"""A training whose user presses Ctrl-C, catches it, and trains on, beside a plain one that is never interrupted."""

import collections
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from loop import PLACEMENTS, Trained
from parity import check_at_rest
from safetensors.torch import load_file
from torch import Tensor

from gemini.errors import TornStep

PHASES = ("forward and backward", "step", "save")
ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / name) + "/" for name in ("gemini", "chunk", "lazy"))


class Interrupt:
    """Where an interrupt comes: within the context, or not at all. ``was_raised`` says whether it came."""

    was_raised = False

    def __str__(self) -> str:
        return "nowhere"

    @contextmanager
    def armed(self) -> Iterator[None]:
        yield


class AfterSeconds(Interrupt):
    """A signal of a timer, whose handler raises KeyboardInterrupt as Python's own does for SIGINT."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __str__(self) -> str:
        return f"after {self._seconds} s"

    @contextmanager
    def armed(self) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, self._raise)
        try:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.was_raised = True
        raise KeyboardInterrupt


class AtLine(Interrupt):
    """Ctrl-C before a line of our code runs on this thread for the n-th time; without a place all lines are counted."""

    def __init__(self, place: tuple[CodeType, int] | None = None, nth: int = 1) -> None:
        self.counts: collections.Counter[tuple[CodeType, int]] = collections.Counter()
        self._place = place
        self._nth = nth

    @property
    def moment(self) -> tuple[tuple[CodeType, int], int]:
        """The place, and the how many-th time."""
        assert self._place is not None
        return self._place, self._nth

    def __str__(self) -> str:
        if self._place is None:
            return "nowhere"
        code, line = self._place
        return f"at {Path(code.co_filename).relative_to(ROOT)}:{line}, time {self._nth}"

    @contextmanager
    def armed(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.was_raised:
            return None
        code = frame.f_code
        if self._place is not None and code is not self._place[0]:
            return None
        return self._line if code.co_filename.startswith(OURS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event != "line":
            return self._line
        place = (frame.f_code, frame.f_lineno)
        self.counts[place] += 1
        if place == self._place and self.counts[place] == self._nth:
            self.was_raised = True
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return self._line


class Twice(AtLine):
    """Ctrl-C before a line of our code runs, and again before another one that runs a few lines later."""

    def __init__(self, place: tuple[CodeType, int], nth: int, lines_between: int) -> None:
        super().__init__(place, nth)
        self._left = self._between = lines_between

    def __str__(self) -> str:
        return f"{super().__str__()}, and {self._between} lines later"

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event != "line":
            return self._line
        if not self.was_raised:
            place = (frame.f_code, frame.f_lineno)
            self.counts[place] += 1
            if place == self._place and self.counts[place] == self._nth:
                self.was_raised = True
                signal.raise_signal(signal.SIGINT)
        else:
            self._left -= 1
            if not self._left:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self._line


class Interrupted:
    """One model in training, ours beside plain PyTorch.

    Parameters
    ----------
    placement
        A key of `loop.PLACEMENTS`.
    folder
        For what is saved.
    make
        Builds the training; `Trained` by default.
    """

    def __init__(self, placement: str, folder: Path, make: Callable[..., Trained] = Trained, **plugin: Any) -> None:
        self.ours, self.plain = make(PLACEMENTS[placement], **plugin), make(None)
        self._is_torn_by_interrupts = plugin.get("update_in_backward", False)
        self.number = 0
        self.folder = folder
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.step("", Interrupt())
        self.step("", Interrupt())
        self.save()
        self._saved = self.ours.weights()
        """What is in the checkpoint for certain."""

    def save(self) -> None:
        self.ours.booster.save_model(self.ours.model, str(self._file))
        if self._is_torn_by_interrupts:
            self.ours.booster.save_optimizer(self.ours.optimizer, str(self.folder / "optimizer"))

    @property
    def _file(self) -> Path:
        return self.folder / "saved.safetensors"

    def step(self, phase: str, interrupt: Interrupt) -> str:
        """Take the next step, with an interrupt in a phase of it. What came of it, in words; "wrong" is one."""
        run, number = self.ours, self.number
        armed = {each: Interrupt() for each in PHASES} | {phase: interrupt}
        torch.manual_seed(number)
        outcome = "no interrupt"
        try:
            with self._timed(PHASES[0]), armed[PHASES[0]].armed():
                loss = run.loss(number)
                run.backward(loss)
            with self._timed(PHASES[1]), armed[PHASES[1]].armed():
                run.optimizer.step()
            if phase == PHASES[2]:
                with self._timed(PHASES[2]), armed[PHASES[2]].armed():
                    self.save()
        except KeyboardInterrupt:
            outcome = "interrupted"
        if interrupt.was_raised and outcome == "no interrupt":
            outcome = "swallowed"
        try:
            if self._is_torn_by_interrupts and outcome == "interrupted":
                run.optimizer.step()  # backward may have taken its part of it
            run.optimizer.zero_grad()
            states = run.optimizer.state_dict()["state"].values()
        except TornStep:
            return self._reload()
        taken = {int(state["step"]) for state in states}
        if len(taken) > 1:
            return f"wrong: parameters are at steps {sorted(taken)}"
        if taken == {number} or (not taken and number == 0):
            torch.manual_seed(number)
            run.step(number)
            outcome += ", not taken" if outcome == "interrupted" else ""
        if phase == PHASES[2] and not self._is_saved_whole():
            return f"{outcome}; wrong: the checkpoint is neither the old one nor the new one"
        torch.manual_seed(number)
        self.plain.step(number)
        self.number += 1
        return outcome + self._difference()

    def _reload(self) -> str:
        """Load the checkpoint after a torn step; nothing can be compared with plain PyTorch from then on."""
        if not self._is_torn_by_interrupts:
            return "wrong: TornStep"
        self.ours.booster.load_model(self.ours.model, str(self._file))
        self.ours.booster.load_optimizer(self.ours.optimizer, str(self.folder / "optimizer"))
        return "torn, reloaded" if _are_equal(self.ours.weights(), self._saved) else "torn; wrong: not what was saved"

    def _is_saved_whole(self) -> bool:
        """After a save, which may have been interrupted."""
        found, new = load_file(self._file), self.ours.weights()
        if _are_equal(found, new):
            self._saved = new
            return True
        return _are_equal(found, self._saved)

    def _difference(self) -> str:
        check_at_rest(self.ours.model)
        theirs = self.plain.weights()
        wrong = [name for name, value in self.ours.weights().items() if not torch.equal(value, theirs[name])]
        return f"; wrong: {wrong}" if wrong else ""

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - begin


def _are_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


def outcome_of(run: Interrupted, phase: str, interrupt: Interrupt) -> str:
    """Of one step; an error that should not come is one, too."""
    try:
        return run.step(phase, interrupt)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"wrong: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"


def lines_of(run: Interrupted, phase: str) -> list[tuple[tuple[CodeType, int], int]]:
    """Every line of our code that a phase of a step runs, and how often."""
    counting = AtLine()
    outcome = outcome_of(run, phase, counting)
    assert outcome == "no interrupt", outcome
    return list(counting.counts.items())


def random_delays(seed: int, most: float) -> Iterator[float]:
    generator = random.Random(seed)
    while True:
        yield 1e-5 + generator.random() * most
