"""``gemini-stat lease``: who holds what, and asking a run to change."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemini.lease.asked import from_text
from gemini.lease.folder import Lease, LeaseFolder
from gemini.lease.holder import own_standing
from gemini.lease.limits import ram_limits
from gemini.lease.machine import read_machine
from gemini.lease.standing import DISK, HOST, Answer, Holding, Seen
from gemini.stat.cli import main
from gemini.stat.console import Exit

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def lease() -> Iterator[Lease]:
    """A run that holds 8 GiB of RAM and 20 of a disk."""
    from msgspec.structs import replace

    pools = tuple(limit.pool for limit in ram_limits())
    host = Holding(pools=pools, floor=GIB, wish=9 * GIB, held=8 * GIB, used=5 * GIB)
    disk = Holding(
        pools=("disk x",), seen={"disk x": Seen("a disk", 50 * GIB, 100 * GIB)}, floor=0, wish=30 * GIB, held=20 * GIB
    )
    standing = replace(own_standing("a job", "train.py", 0, 1), holdings={HOST: host, DISK: disk})
    found = LeaseFolder().begin(standing)
    yield found
    found.end()


@contextmanager
def answering(lease: Lease, is_done: bool, text: str) -> Iterator[list[dict[str, int]]]:
    """The run follows what it is asked; what that was."""
    asked: list[dict[str, int]] = []
    is_over = threading.Event()

    def follow() -> None:
        from msgspec.structs import replace

        while not is_over.wait(0.01):
            if (found := lease.take_asked()) is not None and (wanted := from_text(found)) is not None:
                asked.append(wanted.nbytes)
                lease.say(replace(lease.standing, answer=Answer(wanted.id, is_done, text)))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield asked
    finally:
        is_over.set()
        thread.join(10)


def test_a_machine_without_runs_shows_what_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lease"]) == Exit.OK
    said = capsys.readouterr()
    assert "free, 0 B promised (0 leases)" in said.out
    assert "no run holds a lease" in said.err
    assert main(["lease", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert found["leases"] == []
    assert [memory["memory"] for memory in found["memories"]] == ["host"]


def test_it_shows_who_holds_what_and_what_is_left(lease: Lease, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lease"]) == Exit.OK
    said = capsys.readouterr().out
    assert "8.0 GiB promised (1 lease)" in said
    assert "a disk 100.0 GiB: 50.0 GiB free, 20.0 GiB promised (1 lease)" in said
    assert all(len(line) <= 80 for line in said.splitlines()[:2])
    assert "train.py" in said
    assert main(["lease", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    (state,) = found["leases"]
    assert (state["lease"], state["pid"], state["job"]) == (lease.name, lease.standing.pid, "a job")
    host = {"held_bytes": 8 * GIB, "used_bytes": 5 * GIB, "floor_bytes": GIB, "wish_bytes": 9 * GIB}
    assert state["memories"]["host"] == host
    assert all(memory["leases"] == [lease.name] for memory in found["memories"])


@pytest.mark.parametrize("named", ["lease", "pid", "job"])
def test_a_run_that_is_asked_follows_and_its_answer_is_shown(
    lease: Lease, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = {"lease": lease.name, "pid": str(lease.standing.pid), "job": "a job"}[named]
    with answering(lease, True, "host 4.0 GiB") as asked:
        assert main(["lease", target, "--host", "4GiB", "--timeout", "20"]) == Exit.OK
    assert asked == [{"host": 4 * GIB}]
    assert capsys.readouterr().out == f"process {lease.standing.pid} has host 4.0 GiB now\n"


def test_a_run_that_cannot_says_why_and_the_exit_code_is_negative(
    lease: Lease, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(lease, False, "host tier out of memory: give 2 GiB or more"):
        assert main(["lease", lease.name, "--host", "1GiB", "--disk", "5GB", "--json"]) == Exit.NEGATIVE
    found = json.loads(capsys.readouterr().out)
    assert (found["is_done"], found["text"]) == (False, "host tier out of memory: give 2 GiB or more")


def test_no_answer_in_time_is_said_and_nothing_is_left_behind(lease: Lease, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lease", lease.name, "--host", "1GiB", "--timeout", "0"]) == Exit.NEGATIVE
    assert "no answer after 0 s: a run follows at its next forward" in capsys.readouterr().err
    assert lease.take_asked() is None


def test_mistakes_are_usage_errors_and_a_run_that_is_not_there_is_no_run(lease: Lease) -> None:
    assert main(["lease", lease.name, "--host", "much"]) == Exit.USAGE
    assert main(["lease", lease.name, "--host", "0"]) == Exit.USAGE
    assert main(["lease", lease.name, "--host", "1GiB", "--timeout", "-1"]) == Exit.USAGE
    assert main(["lease", "--host", "1GiB"]) == Exit.USAGE
    assert main(["lease", "nothing", "--host", "1GiB"]) == Exit.NO_RUN
    assert main(["lease", "nothing"]) == Exit.NO_RUN


def test_the_live_screen_shows_the_machine(lease: Lease) -> None:
    from gemini.stat.machine_panel import memories

    machine = read_machine()
    first = memories(machine, 120)[0].plain
    assert first.startswith(" available RAM ")
    assert "8.0 GiB promised (1 lease)" in first
    assert len(memories(machine, 30)[0].plain) <= 30
