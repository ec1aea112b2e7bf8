"""The life of a run's files: written without disturbing training, whatever becomes of it."""

import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from telemetry_runs import STEP, folder_of, living_child, open_writer, records_of, script

from gemini.telemetry import channel, reader, record_file
from gemini.telemetry.discovery import NoRun, find_run, list_runs
from gemini.telemetry.layout import lock_file, older_records_file, records_file, runs_folder, start_file
from gemini.telemetry.reader import read_run
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.writer import TelemetryWriter


def test_a_closed_run_is_finished_and_shows_its_last_step() -> None:
    telemetry = open_writer(model="gpt", ratio=math.nan)
    telemetry.record_step({**STEP, "device/peak_bytes": 99})
    telemetry.record_step(STEP)
    run = folder_of(telemetry)
    telemetry.close(summary={"tokens": 7})
    view = read_run(run)
    assert view.status is RunStatus.FINISHED
    assert view.step == 3
    assert view.stats == STEP
    assert view.peaks == {"device": 99}
    assert view.summary == {"tokens": 7}
    assert view.identity.facts == {"model": "gpt", "ratio": None}
    assert view.identity.pid == os.getpid()
    assert [record["type"] for record in records_of(run)] == ["start", "step", "step", "end"]


def test_closing_twice_writes_one_end() -> None:
    telemetry = open_writer()
    run = folder_of(telemetry)
    telemetry.close("crashed")
    telemetry.close("finished")
    telemetry.record_step(STEP)
    assert [record["type"] for record in records_of(run)] == ["start", "end"]
    assert read_run(run).status is RunStatus.CRASHED


def test_an_open_run_is_running_also_seen_from_its_own_process() -> None:
    telemetry = open_writer()
    run = folder_of(telemetry)
    assert read_run(run).status is RunStatus.RUNNING
    # Reading must not have dropped the lock: another process still sees the run alive.
    code = "import sys, pathlib, gemini.telemetry.reader as r; print(r.read_run(pathlib.Path(sys.argv[1])).status)"
    seen = subprocess.run(
        [sys.executable, "-c", code, run], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "RUNNING" in seen
    telemetry.close()


def test_a_collected_writer_has_finished() -> None:
    telemetry = open_writer()
    telemetry.record_step(STEP)
    run = folder_of(telemetry)
    thread = telemetry._channel._thread  # type: ignore[union-attr]
    del telemetry
    thread.join(10)
    assert read_run(run).status is RunStatus.FINISHED


@pytest.mark.parametrize(
    ("ending", "status", "reason"),
    [
        ("pass", RunStatus.FINISHED, ""),
        ("sys.exit(3)", RunStatus.FINISHED, ""),
        ("raise ValueError('no data')", RunStatus.CRASHED, "ValueError: no data"),
        (
            "import atexit; atexit.register(w.close); raise ValueError('no data')",
            RunStatus.CRASHED,
            "ValueError: no data",
        ),
        ("sys.last_value = ValueError('earlier'); w.close()", RunStatus.FINISHED, ""),
        ("os._exit(0)", RunStatus.CRASHED, "its process is gone and wrote no end"),
        ("os.kill(os.getpid(), signal.SIGKILL)", RunStatus.CRASHED, "its process is gone and wrote no end"),
    ],
)
def test_how_a_script_ended_is_known(ending: str, status: RunStatus, reason: str) -> None:
    script(ending)
    (view,) = list_runs()
    assert (view.status, view.reason) == (status, reason)


@pytest.mark.parametrize(
    ("ending", "status", "reason"),
    [
        ("pass", RunStatus.FINISHED, ""),
        ("sys.exit(0)", RunStatus.FINISHED, ""),
        ("sys.exit(3)", RunStatus.CRASHED, "SystemExit: 3"),
        ("raise ValueError('no data')", RunStatus.CRASHED, "ValueError: no data"),
    ],
)
def test_how_a_forked_process_of_multiprocessing_ended_is_known(ending: str, status: RunStatus, reason: str) -> None:
    script(
        "w.close(); import multiprocessing\n"
        "def train():\n"
        "    global inner\n"
        "    inner = TelemetryWriter(min_interval_seconds=0.0)\n"
        f"    {ending}\n"
        "child = multiprocessing.get_context('fork').Process(target=train)\n"
        "child.start(); child.join(20)"
    )
    (first, view) = sorted(list_runs(), key=lambda ranks: ranks.views[0].identity.started)
    assert first.status is RunStatus.FINISHED
    assert (view.status, view.reason) == (status, reason)


def test_kill_9_turns_a_running_run_into_a_crashed_one() -> None:
    with living_child() as child:
        assert child.stdout is not None
        run = Path(child.stdout.readline().strip())
        view = read_run(run)
        assert view.status is RunStatus.RUNNING
        assert view.identity.pid == child.pid
        assert view.step == 3
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        assert read_run(run).status is RunStatus.CRASHED


def test_a_live_run_without_new_steps_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    with living_child() as child:
        assert child.stdout is not None
        run = Path(child.stdout.readline().strip())
        assert read_run(run).updated is not None
        later = reader.time.time() + 31
        monkeypatch.setattr(reader.time, "time", lambda: later)
        view = read_run(run)
        assert view.status is RunStatus.STALLED
        assert view.is_live
        assert "no step for" in view.reason


def test_a_run_of_another_host_is_judged_by_its_heartbeat() -> None:
    telemetry = open_writer()
    run = folder_of(telemetry)
    telemetry.close()
    start_file(run, 0).write_bytes(b'{"v":1,"host":"elsewhere","pid":1,"t":1}\n')
    records_file(run, 0).unlink()
    assert read_run(run).status is RunStatus.RUNNING
    os.utime(lock_file(run, 0), (0, 0))
    view = read_run(run)
    assert view.status is RunStatus.UNKNOWN
    assert "elsewhere" in view.reason


def test_a_forked_child_does_not_speak_for_its_parent() -> None:
    done = script("pid = os.fork()\nif pid == 0:\n    w.record_step({'step/count': 99})\n    w.close('crashed')\n"
                  "    sys.exit(0)\nos.waitpid(pid, 0)\n")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (view,) = list_runs()
    assert view.step == 3
    assert view.status is RunStatus.FINISHED


def test_a_full_disk_switches_telemetry_off_and_leaves_whole_lines() -> None:
    done = script(
        "import resource, logging\nlogging.basicConfig()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "for i in range(100): w.record_step({'step/count': i})\n"
        "w._channel.join()\n"
        "assert w.run_dir is None\n"
        "w.record_step({'step/count': 1}); w.close(); print('training went on')",
        check=True,
    )
    assert "training went on" in done.stdout
    assert done.stderr.count("is off from here on") == 1
    (view,) = list_runs()
    data = records_file(view.path, 0).read_bytes()
    assert 0 < len(data) <= 3000
    assert data.endswith(b"\n")
    assert (view.step or 0) > 0


def test_a_folder_that_cannot_be_made_switches_telemetry_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        telemetry = open_writer(tmp_path / "file" / "run")
    assert telemetry.run_dir is None
    assert len(caplog.records) == 1
    telemetry.record_step(STEP)
    telemetry.close()


def test_a_full_queue_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "QUEUE_LENGTH", 0)
    telemetry = open_writer()
    telemetry.record_step(STEP)
    telemetry.record_step(STEP)
    assert telemetry.dropped_count == 2
    run = folder_of(telemetry)
    telemetry.close()
    assert read_run(run).dropped_count == 2


def test_steps_in_quick_succession_are_thinned_out_but_the_last_one_is_kept() -> None:
    telemetry = TelemetryWriter(min_interval_seconds=3600)
    for count in range(50):
        telemetry.record_step({"step/count": count})
    run = folder_of(telemetry)
    telemetry.close()
    steps = [record["stats"]["step/count"] for record in records_of(run) if record["type"] == "step"]
    assert steps == [0, 49]


def test_what_json_cannot_say_becomes_null_or_text() -> None:
    class Scalar:
        def __float__(self) -> float:
            return 0.5

    telemetry = open_writer(path=Path("x"), scalar=Scalar())
    telemetry.record_step({"step/count": 1, "move/prefetch_hit_ratio": math.inf})
    run = folder_of(telemetry)
    telemetry.close()
    view = read_run(run)
    assert view.identity.facts == {"path": "x", "scalar": 0.5}
    assert view.stats == {"step/count": 1}


def test_a_long_run_keeps_two_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "ROTATE_BYTES", 2000)
    monkeypatch.setattr(channel, "QUEUE_LENGTH", 1000)
    telemetry = open_writer()
    for count in range(100):
        telemetry.record_step({"step/count": count})
    run = folder_of(telemetry)
    telemetry.close()
    assert records_file(run, 0).stat().st_size <= 2500
    assert older_records_file(run, 0).stat().st_size <= 2500
    view = read_run(run)
    assert view.step == 99
    assert view.status is RunStatus.FINISHED


def test_folders_and_files_are_for_the_user_alone(state_home: Path) -> None:
    telemetry = open_writer()
    run = folder_of(telemetry)
    telemetry.close()
    assert run.parent == runs_folder()
    assert run.is_relative_to(state_home)
    assert run.stat().st_mode & 0o777 == 0o700
    for file in run.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600


def test_a_chosen_folder_is_found_by_run_id_too(tmp_path: Path) -> None:
    telemetry = open_writer(tmp_path / "mine")
    telemetry.record_step(STEP)
    telemetry.close()
    (view,) = list_runs()
    assert view.path.resolve() == (tmp_path / "mine").resolve()
    assert find_run(view.identity.run_id)[0].resolve() == (tmp_path / "mine").resolve()


def test_the_environment_chooses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_MEMORY_RUN_DIR", str(tmp_path / "env"))
    with pytest.raises(NoRun, match="GEMINI_MEMORY_RUN_DIR"):
        find_run()
    telemetry = open_writer()
    telemetry.close()
    assert find_run()[0] == tmp_path / "env"


def test_a_second_run_in_one_folder_hides_the_first(tmp_path: Path) -> None:
    first = open_writer(tmp_path / "run", number=1)
    first.record_step({"step/count": 100, "device/peak_bytes": 100})
    second = open_writer(tmp_path / "run", number=2)  # the first one is still open: it makes room
    second.record_step({"step/count": 1, "device/peak_bytes": 1})
    first.record_step({"step/count": 101})
    first.close()
    second.close()
    view = read_run(tmp_path / "run")
    assert view.identity.facts == {"number": 2}
    assert view.peaks == {"device": 1}
    assert view.step == 1
    assert len(list_runs()) == 1


def test_a_folder_in_use_by_another_process_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with living_child() as child:
        assert child.stdout is not None
        run = Path(child.stdout.readline().strip())
        with caplog.at_level(logging.WARNING):
            assert open_writer(run).run_dir is None
        assert "in use by another run" in caplog.text
        assert read_run(run).status is RunStatus.RUNNING


def test_neither_side_imports_torch() -> None:
    code = "import sys, gemini.telemetry.writer, gemini.telemetry.discovery; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
