"""Runs in processes of their own share RAM that either alone would fill: both train to the end, with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemini.lease.folder import LeaseFolder
from gemini.lease.standing import Standing

ROOT = Path(__file__).parents[3]
CHILD = Path(__file__).with_name("child_shares.py")
MIB = 1 << 20
TOTAL = 520 * MIB
STEPS = 16
NEIGHBOUR = """
import os, sys
from pathlib import Path
folder, nbytes = Path(sys.argv[1]), int(sys.argv[2])
(folder / str(os.getpid())).write_text("1")
held = b"x" * nbytes
print("there", flush=True)
sys.stdin.readline()
"""


class Run:
    """A child that trains."""

    def __init__(self, folder: Path, **asked: Any) -> None:
        asked = {"folder": str(folder), "total": TOTAL, "layers": 12, "steps": STEPS, "waits_after": [], **asked}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder)}
        self.child = subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(asked)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.capacity = 0
        self.on_disk = 0

    def read(self) -> list[str]:
        """The next line that it says."""
        assert self.child.stdout is not None and self.child.stderr is not None
        line = self.child.stdout.readline()
        if not line:
            raise AssertionError(self.child.stderr.read()[-3000:])
        words = line.split()
        if words[0].isdecimal():
            self.capacity, self.on_disk = int(words[1]), int(words[2])
        return [line] if line.startswith("{") else words

    def read_until(self, word: str) -> None:
        """What it says up to a line that begins so; the first line of that kind is of the warm-up."""
        while self.read()[0] != word:
            pass

    def go_on(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def outcome(self) -> Any:
        """What it has to show at its end."""
        while not (line := self.read()[0]).startswith("{"):
            pass
        assert self.child.wait(60) == 0
        return json.loads(line)


@contextmanager
def running(*runs: Run) -> Iterator[None]:
    try:
        yield
    finally:
        for run in runs:
            run.child.kill()
            run.child.communicate(timeout=20)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run alone on the machine has to show, with as much RAM as it likes."""
    run = Run(tmp_path_factory.mktemp("alone"), total=4096 * MIB)
    with running(run):
        return run.outcome()


def check_same(outcome: Any, alone: Any) -> None:
    assert outcome["losses"] == alone["losses"]
    assert outcome["weights"] == alone["weights"]


@pytest.mark.heavy
def test_a_second_run_gets_its_share_of_what_the_first_would_fill(tmp_path: Path, alone: Any) -> None:
    assert alone["on_disk"][-1] == 0
    first = Run(tmp_path, waits_after=[3])
    with running(first):
        first.read_until("boosted")  # the warm-up's
        first.read_until("boosted")
        first.read_until("3")
        assert first.on_disk < 40 * MIB  # it has what it wants, or nearly
        second = Run(tmp_path)
        with running(second):
            while not any(map(waits_in_the_group, standings(tmp_path).values())):
                assert second.child.poll() is None
            first.go_on()
            outcomes = first.outcome(), second.outcome()
    for outcome in outcomes:
        check_same(outcome, alone)
    assert outcomes[0]["capacities"][-1] < outcomes[0]["capacities"][2]
    assert max(outcomes[0]["on_disk"]) > 0
    assert outcomes[1]["on_disk"][0] > 0


def waits_in_the_group(standing: Standing) -> bool:
    """True where a run waits for the RAM that is shared: its warm-up, which is boosted before, has that of the machine.

    What went on at the warm-up could be over before the other run asks for its share.
    """
    return standing.is_waiting and any("the group" in holding.pools for holding in standing.holdings.values())


def standings(folder: Path) -> Any:
    return LeaseFolder(folder / "gemini-memory" / "leases").standings()


@pytest.mark.heavy
def test_what_a_killed_run_held_is_free_within_a_second_and_the_other_takes_it(tmp_path: Path) -> None:
    first = Run(tmp_path, steps=4000)
    with running(first):
        first.read_until("boosted")
        first.read_until("boosted")
        second = Run(tmp_path, waits_after=[2])
        with running(second):
            check_free(first, second, tmp_path)


def check_free(first: Run, second: Run, folder: Path) -> None:
    """Kill the second one when both have settled."""
    with ThreadPoolExecutor(1) as pool:
        settled = pool.submit(lambda: [second.read_until(word) for word in ("boosted", "boosted", "2")])
        while not settled.done():
            first.read()  # it goes on
        settled.result()
    for _ in range(20):
        first.read()
    assert len(standings(folder)) == 2
    before = first.on_disk
    assert before > 0
    os.kill(second.child.pid, signal.SIGKILL)
    second.child.wait(20)
    begin = time.monotonic()
    while len(standings(folder)) > 1:
        assert time.monotonic() - begin < 1.0
    end = time.monotonic() + 60
    while first.on_disk >= before:
        first.read()
        assert time.monotonic() < end


@pytest.mark.heavy
def test_a_neighbour_that_allocates_half_takes_it_and_numbers_stay(tmp_path: Path, alone: Any) -> None:
    run = Run(tmp_path, waits_after=[3, 8])
    with running(run):
        run.read_until("boosted")
        run.read_until("boosted")
        run.read_until("3")
        before = run.capacity
        command = [sys.executable, "-c", NEIGHBOUR, str(tmp_path / "group"), str(TOTAL // 2 - 40 * MIB)]
        neighbour = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "there\n"
        run.go_on()
        run.read_until("8")
        assert run.capacity < before
        assert run.on_disk > 0
        neighbour.communicate("\n", timeout=20)
        run.go_on()
        check_same(run.outcome(), alone)


@pytest.mark.heavy
def test_two_models_without_an_argument_leave_each_other_room_under_a_limit_of_the_process(tmp_path: Path) -> None:
    def train(*limit: str) -> Any:
        child = Path(__file__).with_name("child_two_models.py")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, str(child), str(tmp_path), *limit],
            capture_output=True, text=True, timeout=200, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    free, limited = train(), train("400")
    assert free["on_disk"] == [0, 0]
    assert all(nbytes > 0 for nbytes in limited["on_disk"])
    assert limited["losses"] == free["losses"]
