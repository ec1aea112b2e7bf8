"""Real processes that are killed, that read, or that write at once: ``child_kills.py FOLDER KILLS``; prints a table.

This process imports and loads kernels, which takes seconds; children that it forks build a boosted model, so that no
thread is lost by a fork.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed.fsdp
from forms import FORMS, REFUSED, Form, Subject, is_same, state_of
from operations import Dead, Killed, intercepted

from gemini.errors import CheckpointError
from gemini.nn.optimizer.kernels.update import is_compiled

CHOSEN = ("checkpoint that replaces one", "pair", "sharded")
LAST = 5


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(3)
    return child


def ended(child: int) -> int:
    """The exit code; negative: the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(file: Path, child: int) -> None:
    """Until a child has made a file, or has ended."""
    while not file.exists():
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "the child has ended"
        time.sleep(0.001)


def keep_states(form: Form, file: Path) -> None:
    """What is saved at each step."""
    subject = Subject(form.build)
    for step in range(1, LAST + 1):
        subject.go_to(step)
    torch.save(subject.states, file)


class Writer:
    """Saves one step after the other, again and again."""

    def __init__(self, form: Form, folder: Path, deadly: int | None = None) -> None:
        self.form, self.folder, self.deadly = form, folder, deadly

    def __call__(self) -> None:
        subject = Subject(self.form.build)
        subject.go_to(1)
        self.form.save(subject, self.folder)
        (self.folder.parent / "begun").touch()
        for step in range(2, LAST + 1):
            subject.go_to(step)
            if step == 3 and self.deadly is not None:
                self._die(subject)
            self.form.save(subject, self.folder)
        while self.deadly is None:
            self.form.save(subject, self.folder)

    def _die(self, subject: Subject) -> None:
        try:
            with intercepted(self.folder, Killed(self.deadly or 0)):
                self.form.save(subject, self.folder)
        except Dead:
            os.kill(os.getpid(), signal.SIGKILL)


def found(form: Form, states: dict[int, Any], folder: Path) -> int:
    """The step of what loads; in a child, since loading boosts."""
    out, into = os.pipe()

    def load() -> None:
        subject = Subject(form.build, seed=1)
        try:
            form.load(subject, folder)
        except CheckpointError as error:
            if not (form.is_pair and "another state of training" in str(error)):
                raise
            os.write(into, bytes([REFUSED]))
            return
        for step, state in states.items():
            if all(is_same(state_of(subject, part), state[part]) for part in form.parts):
                os.write(into, bytes([step]))
                return
        raise AssertionError("a mix")

    child = fork(load)
    os.close(into)
    step = os.read(out, 1)
    os.close(out)
    assert ended(child) == 0, f"{form.name}: it does not load"
    return step[0]


def kill(form: Form, states: dict[int, Any], folder: Path, rng: random.Random, count: int) -> Counter[str]:
    """Half of them at a call, half at any moment."""
    outcomes: Counter[str] = Counter()
    for n in range(count):
        work = folder / f"{form.name} {n}" / "run"
        work.mkdir(parents=True)
        at_random = n % 2 == 0
        writer = fork(Writer(form, work, None if at_random else rng.randrange(120)))
        if at_random:
            wait_for(work.parent / "begun", writer)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(writer, signal.SIGKILL)
        outcomes["killed" if ended(writer) == -signal.SIGKILL else "ended before"] += 1
        step = found(form, states, work)
        outcomes["refused" if step == REFUSED else "whole"] += 1
    return outcomes


def read(form: Form, states: dict[int, Any], folder: Path, count: int) -> Counter[str]:
    """Load while two other processes save into the same folder."""
    work = folder / f"{form.name} read" / "run"
    work.mkdir(parents=True)
    writers = [fork(Writer(form, work)) for _ in range(2)]
    wait_for(work.parent / "begun", writers[0])
    outcomes = Counter("whole" if found(form, states, work) else "refused" for _ in range(count))
    for writer in writers:
        os.kill(writer, signal.SIGKILL)
        ended(writer)
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert is_compiled("cpu")  # loads the kernels
    rng, kills = random.Random(11), int(sys.argv[2])
    table = {}
    for form in (form for form in FORMS if form.name in CHOSEN):
        file = Path(sys.argv[1]) / f"{form.name}.pt"
        assert ended(fork(partial(keep_states, form, file))) == 0
        states = torch.load(file, weights_only=False)
        folder = Path(sys.argv[1])
        table[form.name] = {
            "killed": kill(form, states, folder, rng, kills // len(CHOSEN)),
            "read while two write": read(form, states, folder, max(2, kills // 20)),
        }
    print(json.dumps(table))
