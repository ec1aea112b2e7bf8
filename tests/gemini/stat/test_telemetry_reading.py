"""A run's files are read whatever state they are in."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from telemetry_runs import STEP, folder_of, living_child, open_writer

from gemini.telemetry import reader
from gemini.telemetry.discovery import NoRun, find_run, list_runs
from gemini.telemetry.files import Unreadable
from gemini.telemetry.layout import VERSION, records_file, runs_folder
from gemini.telemetry.reader import read_run
from gemini.telemetry.run_folder import prune
from gemini.telemetry.run_status import RunStatus


@pytest.mark.parametrize("tail", [b'{"v":1,"type":"step","stats":{"step/cou', b"\xff\xfe\n", b"[]\n3\n", b"\n\n"])
def test_a_torn_or_foreign_tail_is_skipped(tail: bytes) -> None:
    telemetry = open_writer()
    telemetry.record_step(STEP)
    run = folder_of(telemetry)
    telemetry.close()
    with open(records_file(run, 0), "ab") as file:
        file.write(tail)
    view = read_run(run)
    assert view.step == 3
    assert view.status is RunStatus.FINISHED


def test_a_writer_that_follows_a_torn_tail_starts_a_line_of_its_own(tmp_path: Path) -> None:
    tmp_path.joinpath("run").mkdir()
    records_file(tmp_path / "run", 0).write_bytes(b'{"v":1,"type":"st')
    telemetry = open_writer(tmp_path / "run")
    telemetry.record_step(STEP)
    telemetry.close()
    assert read_run(tmp_path / "run").step == 3


@pytest.mark.parametrize(
    "record",
    [
        {"type": "from the future", "v": VERSION},
        {"type": "step", "v": VERSION + 0.5, "stats": {**STEP, "new/thing": {"a": 1}, "bad": "text", "huge": 10**400}},
        {"type": "step", "v": VERSION, "stats": None},
    ],
)
def test_newer_minor_versions_and_strange_values_are_read(record: dict[str, Any]) -> None:
    telemetry = open_writer()
    run = folder_of(telemetry)
    telemetry.close()
    with open(records_file(run, 0), "a") as file:
        file.write(json.dumps(record) + "\n")
    assert set(read_run(run).stats) <= set(STEP)


def test_a_newer_major_version_is_refused() -> None:
    telemetry = open_writer()
    run = folder_of(telemetry)
    telemetry.close()
    with open(records_file(run, 0), "a") as file:
        file.write(json.dumps({"type": "step", "v": VERSION + 1}) + "\n")
    with pytest.raises(Unreadable, match="update gemini-memory"):
        read_run(run)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\x00" * 10, b"[" * 100_000, b'{"v": 2}'])
def test_a_damaged_run_file_is_unreadable_and_does_not_hide_other_runs(content: bytes) -> None:
    good, bad = open_writer(), open_writer()
    run = folder_of(bad)
    good.close()
    bad.close()
    (run / "run.json").write_bytes(content)
    with pytest.raises(Unreadable):
        read_run(run)
    assert len(list_runs()) == 1


def test_a_fifo_in_place_of_a_file_does_not_hang() -> None:
    telemetry = open_writer()
    run = folder_of(telemetry)
    telemetry.close()
    records_file(run, 0).unlink()
    os.mkfifo(records_file(run, 0))
    with pytest.raises(Unreadable, match="not a regular file"):
        read_run(run)


def test_only_the_tail_of_a_long_file_is_read() -> None:
    telemetry = open_writer()
    run = folder_of(telemetry)
    telemetry.record_step(STEP)
    telemetry.close()
    whole = records_file(run, 0).read_bytes()
    records_file(run, 0).write_bytes(b"x" * (reader.TAIL_BYTES * 3) + whole)
    assert read_run(run).step == 3


def test_old_runs_are_pruned_but_never_live_or_foreign_ones(tmp_path: Path) -> None:
    for _ in range(4):
        open_writer().close()
    telemetry = open_writer()
    (runs_folder() / "notes").mkdir()
    with living_child() as child:
        assert child.stdout is not None
        child.stdout.readline()
        prune({folder_of(telemetry).resolve()}, keep=0)
        left = {view.identity.pid for view in list_runs()}
        assert left == {os.getpid(), child.pid}
    assert (runs_folder() / "notes").is_dir()
    assert len(list_runs()) == 2
    telemetry.close()


def test_runs_are_found_by_pid_id_beginning_and_age() -> None:
    with pytest.raises(NoRun, match="GeminiPlugin"):
        find_run()
    with living_child() as child:
        assert child.stdout is not None
        run = Path(child.stdout.readline().strip())
        newer = open_writer()
        newest = folder_of(newer)
        newer.close()
        assert find_run() == (run, "the live run")
        assert find_run(str(child.pid))[0] == run
        assert find_run(run.name)[0] == run
        assert find_run(str(run))[0] == run
        assert find_run(str(runs_folder()))[0] == run
    assert find_run()[0] == newest
    assert "newest" in find_run()[1]
    with pytest.raises(NoRun, match="begins 2 run ids"):
        find_run("20")
    with pytest.raises(NoRun, match="no run folder"):
        find_run("top")
