"""All ranks of a run read together: how it goes, which one is dead, which one the others wait for."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranked_runs import SLOW, close, open_ranks, own_seconds
from stat_runs import RUN_ID, open_run, stats

from gemini.telemetry.job import Job
from gemini.telemetry.layout import lock_file, records_file, start_file
from gemini.telemetry.ranks import Ranks, numbers_text, read_ranks
from gemini.telemetry.reader import read_run
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.writer import TelemetryWriter

TESTS = Path(__file__).resolve().parents[2]


@pytest.fixture
def writers() -> Iterator[list[TelemetryWriter]]:
    made = open_ranks()
    yield made
    close(made)


def folder(writers: list[TelemetryWriter]) -> Path:
    run = writers[0].run_dir
    assert run is not None and all(writer.run_dir == run for writer in writers)
    return run


@contextmanager
def rank_processes(count: int, body: str = "sys.stdin.read()") -> Iterator[list["subprocess.Popen[str]"]]:
    """A process for each rank that has recorded three steps; its folder is what it says first."""
    code = (
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom stat_runs import open_run\n"
        f"w = open_run(3, None, int(sys.argv[1]), {count})\nprint(w.run_dir, flush=True)\n{body}\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate(timeout=30)


def folder_of(children: list["subprocess.Popen[str]"]) -> Path:
    (run,) = {child.stdout.readline().strip() for child in children if child.stdout is not None}
    return Path(run)


def test_a_run_goes_on_while_its_ranks_do_and_has_finished_when_all_have(writers: list[TelemetryWriter]) -> None:
    run = folder(writers)
    found = read_ranks(run)
    assert (found.status, found.reason, found.step, found.missing) == (RunStatus.RUNNING, "", 12, [])
    writers[1].close()
    assert read_ranks(run).status is RunStatus.RUNNING
    close(writers)
    assert (read_ranks(run).status, read_ranks(run).reason) == (RunStatus.FINISHED, "")


def test_a_rank_that_failed_is_named_beside_those_that_go_on(writers: list[TelemetryWriter]) -> None:
    run = folder(writers)
    writers[2].close("crashed")
    found = read_ranks(run)
    assert (found.status, found.reason) == (RunStatus.CRASHED, "rank 2 crashed; ranks 0-1, 3 running")
    assert found.worst.rank == 2


def test_a_killed_rank_is_named_and_so_is_what_came_after() -> None:
    with rank_processes(3) as children:
        run = folder_of(children)
        assert read_ranks(run).status is RunStatus.RUNNING
        children[1].send_signal(signal.SIGKILL)
        children[1].wait(30)
        found = read_ranks(run)
        said = "rank 1 crashed: its process is gone and wrote no end; ranks 0, 2 running"
        assert (found.status, found.reason) == (RunStatus.CRASHED, said)
        for child in (children[0], children[2]):
            child.send_signal(signal.SIGTERM)  # as torchrun ends those that are left
            child.wait(30)
    os.utime(lock_file(run, 1), (1, 1))  # its last heartbeat is longer ago than theirs
    records_file(run, 1).write_text("")
    found = read_ranks(run)
    said = "rank 1 crashed: its process is gone and wrote no end; then ranks 0, 2"
    assert (found.status, found.reason) == (RunStatus.CRASHED, said)


def test_a_terminated_run_is_marked_as_running_nowhere() -> None:
    with rank_processes(2) as children:
        run = folder_of(children)
        for child in children:
            child.terminate()
            child.wait(30)
        assert [view.status for view in read_ranks(run).views] == [RunStatus.CRASHED] * 2


def test_an_uncaught_exception_of_one_rank_is_told_with_its_text() -> None:
    body = "sys.stdin.readline()\nif sys.argv[1] == '1': raise ValueError('no such expert')\nsys.stdin.read()"
    with rank_processes(2, body) as children:
        run = folder_of(children)
        assert children[1].stdin is not None
        children[1].communicate("go on\n", timeout=30)
        said = "rank 1 crashed: ValueError: no such expert; rank 0 running"
        assert read_ranks(run).reason == said


def test_the_error_of_one_rank_is_told_beside_the_end_of_those_that_it_took_along() -> None:
    body = "sys.stdin.readline()\nif sys.argv[1] == '1': raise ValueError('no such expert')\nsys.stdin.read()"
    with rank_processes(3, body) as children:
        run = folder_of(children)
        assert children[1].stdin is not None
        children[1].communicate("go on\n", timeout=30)
        for child in (children[0], children[2]):
            child.terminate()
            child.wait(30)
    now = time.time()
    for rank in range(3):
        os.utime(lock_file(run, rank), (now, now))
    told = read_ranks(run).reason
    assert "rank 1 crashed: ValueError: no such expert" in told
    assert "ranks 0, 2 crashed: its process is gone and wrote no end" in told


def test_the_straggler_is_the_rank_with_the_longest_time_of_its_own(writers: list[TelemetryWriter]) -> None:
    found = read_ranks(folder(writers)).straggler
    assert found is not None
    own = sorted(own_seconds(rank) for rank in range(4))
    assert (found.rank, found.own_seconds) == (SLOW, pytest.approx(own_seconds(SLOW)))
    assert found.ratio == pytest.approx(own_seconds(SLOW) / ((own[1] + own[2]) / 2))
    assert read_ranks(folder(writers)).worst.rank == SLOW


def test_without_waits_no_rank_is_called_a_straggler() -> None:
    writers = [open_run(5, None, rank, 2) for rank in range(2)]
    found = read_ranks(folder(writers))
    assert found.straggler is None
    assert [view.own_seconds for view in found.views] == [None, None]
    close(writers)


def test_one_long_step_is_not_what_a_rank_is_judged_by(writers: list[TelemetryWriter]) -> None:
    writers[0].record_step(stats(13, **{"step/seconds": 0.5, "step/wait_seconds": 0.0}))
    close(writers)
    found = read_ranks(folder(writers))
    expected = (11 * own_seconds(0) + 0.5) / 12
    assert found.views[0].own_seconds == pytest.approx(expected)
    assert found.straggler is not None and found.straggler.rank == SLOW


def test_a_restart_and_a_smaller_run_hide_the_ranks_of_before(tmp_path: Path) -> None:
    close(open_ranks(4, 30, tmp_path / "run"))
    writers = [open_run(2, tmp_path / "run", rank, 2, restart=1) for rank in range(2)]
    found = read_ranks(tmp_path / "run")
    assert [(view.rank, view.step) for view in found.views] == [(0, 2), (1, 2)]
    assert (found.world_size, found.status) == (2, RunStatus.RUNNING)
    close(writers)


def test_a_restart_is_one_whatever_the_launchers_of_its_machines_count() -> None:
    jobs = [Job(rank=r, world_size=2, restart=r, run_id=RUN_ID, attempt="20260101T000000Z-9") for r in range(2)]
    writers = [TelemetryWriter(None, job, min_interval_seconds=0) for job in jobs]
    assert [view.rank for view in read_ranks(folder(writers)).views] == [0, 1]
    close(writers)


def test_ranks_that_have_not_begun_or_write_elsewhere_are_missing() -> None:
    writers = [open_run(2, None, rank, 8) for rank in (1, 4)]
    found = read_ranks(folder(writers))
    assert found.missing == [0, 2, 3, 5, 6, 7]
    assert numbers_text(found.missing) == "ranks 0, 2-3, 5-7"
    close(writers)


def test_a_rank_of_another_machine_is_judged_by_its_own_heartbeat(writers: list[TelemetryWriter]) -> None:
    close(writers[3:])
    run = folder(writers)
    start = json.loads(start_file(run, 3).read_text())
    start_file(run, 3).write_text(json.dumps({**start, "host": "elsewhere"}))
    lines = records_file(run, 3).read_text().splitlines(keepends=True)
    records_file(run, 3).write_text("".join(line for line in lines if '"type":"end"' not in line))
    assert "on host elsewhere, judged by its heartbeat" in read_run(run, 3).reason
    found = read_ranks(run)
    assert (found.status, found.reason) == (RunStatus.RUNNING, "rank 3 judged by heartbeat")
    os.utime(lock_file(run, 3), (1, 1))
    found = read_ranks(run)
    assert found.status is RunStatus.RUNNING
    assert found.reason.startswith("rank 3 unknown: on host elsewhere, whose last heartbeat is ")
    assert len(found.hosts) == 2


def test_the_process_of_a_rank_is_known_however_long_its_file_is(writers: list[TelemetryWriter]) -> None:
    run = folder(writers)
    start = json.loads(start_file(run, 1).read_text())
    start_file(run, 1).write_text(json.dumps({**start, "pid": 1, "host": "elsewhere"}))
    found = read_run(run, 1, tail_bytes=2048)  # the start record is not in there
    assert (found.identity.pid, found.identity.host, found.identity.world_size) == (1, "elsewhere", 4)
    assert Ranks(views=(read_run(run, 0), found)).hosts == [start["host"], "elsewhere"]
