"""The commands of gemini-stat beside the snapshot, as people and scripts use them."""

import csv
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from stat_runs import GIB, MOMENTS, UNITS, chunks, make_run, open_run, stats, timeline

from gemini.stat.cli import main
from gemini.stat.commands.schema import output_schema
from gemini.telemetry.layout import chunks_file, records_file, timeline_file
from gemini.telemetry.schema import records_schema
from gemini.telemetry.writer import TelemetryWriter

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def as_json(capsys: Capture, *arguments: str, code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def follows(content: Any, name: str) -> None:
    schema = output_schema()
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]}).validate(content)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "snapshot"), (["top"], "snapshot"), (["ls"], "ls"), (["dmon"], "dmon"), (["chunks"], "chunks"),
        (["timeline"], "timeline"), (["wait"], "wait"), (["check", "--min-steps", "3"], "check"),
    ],
)  # fmt: skip
def test_json_of_each_command_follows_the_schema(arguments: list[str], name: str, capsys: Capture) -> None:
    make_run()
    content = as_json(capsys, *arguments)
    follows(content, name)
    del content["schema_version"]
    with pytest.raises(jsonschema.ValidationError):
        follows(content, name)


@pytest.mark.parametrize("name", ["export", "report"])
def test_json_about_a_written_file_follows_the_schema(name: str, tmp_path: Path, capsys: Capture) -> None:
    follows(as_json(capsys, name, str(make_run()), "--output", str(tmp_path / "file")), name)


@pytest.mark.parametrize("command", [[], ["dmon"], ["chunks"], ["timeline"], ["check", "--min-steps", "1"]])
def test_an_error_is_json_too(command: list[str], capsys: Capture) -> None:
    content = as_json(capsys, *command, code=4)
    follows(content, "error")


@pytest.mark.parametrize(
    "command", ["top", "ls", "dmon", "chunks", "timeline", "wait", "check", "doctor", "schema", "show"]
)
def test_every_command_explains_itself_in_80_columns(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main([*([] if command == "show" else [command]), "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "exit codes:" in out
    assert max(map(len, out.splitlines())) <= 80


def test_dmon_prints_a_row_per_look_and_ends_with_the_run(capsys: Capture) -> None:
    run = str(make_run())
    assert main(["dmon", run, "-s", "tcmbr"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert len(header) == len(row)
    assert header.startswith("#")
    for shown in ("F ", "12", "0.21 s", "20.0 GiB", "41.0 GiB", "210.0 GiB", "99%", "2.5 GiB/s", "45.0 GiB"):
        assert shown in row
    assert main(["dmon", str(make_run(status="crashed"))]) == 5
    assert main(["dmon", run, "-s", "xyz"]) == 2


def test_dmon_follows_a_live_run_line_by_line() -> None:
    writer = open_run()
    command = [sys.executable, "-m", "gemini.stat", "dmon", str(writer.run_dir), "-d", "0.05", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = json.loads(child.stdout.readline())
        writer.record_step(stats(13))
        writer.close()
        last = [json.loads(line) for line in child.stdout][-1]
        assert child.wait(30) == 0
    assert (first["step"], first["status"]) == (12, "running")
    assert (last["step"], last["status"]) == (13, "finished")
    assert first["links"][0]["bytes_per_step"] == 5 * GIB


def test_a_narrow_table_of_chunks_cuts_names_of_parameters_alone(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "56")
    assert main(["chunks", str(make_run())]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:6] == ["chunk", "state", "homes", "waste", "master", "states"]
    start = heading.index("states") + len("states")
    assert len(rows) == 64 and all("…" not in row[:start] and len(row) <= 56 for row in rows)


def test_chunks_can_be_filtered_and_sorted(capsys: Capture) -> None:
    run = str(make_run())
    assert len(as_json(capsys, "chunks", run)["chunks"]) == 64
    on_disk = as_json(capsys, "chunks", run, "--tier", "disk")["chunks"]
    assert [row["index"] for row in on_disk] == list(range(48, 64))
    assert [r["index"] for r in as_json(capsys, "chunks", run, "--param", "h.1.w3")["chunks"]] == [19]
    assert as_json(capsys, "chunks", run, "--sort", "waste")["chunks"][0]["index"] == 63
    states = {
        kind: as_json(capsys, "chunks", run, "--state", kind)["chunks"] for kind in ("moving", "in-use", "resident")
    }
    assert [len(rows) for rows in states.values()] == [1, 1, 12]
    assert as_json(capsys, "chunks", run, "--group", "1")["chunks"] == []
    assert main(["chunks", run]) == 0
    assert "h.0.w0" in capsys.readouterr().out


def test_a_timeline_is_a_chart_a_table_and_json(capsys: Capture) -> None:
    run = str(make_run())
    content = as_json(capsys, "timeline", run)
    assert len(content["moments"]) == MOMENTS + 1
    peak = content["moments"][content["peak_moment"]]
    assert (peak["phase"], peak["unit"], peak["non_model_bytes"]) == ("forward", UNITS[-1], (len(UNITS) - 1) * GIB // 2)
    assert main(["timeline", run, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["non_model_bytes"]) for row in rows] == timeline(2)["non_model_bytes"]
    assert main(["timeline", run]) == 0
    out = capsys.readouterr().out
    assert "in forward of ln_f" in out
    assert main(["timeline", run, "--step", "2"]) == 0
    assert main(["timeline", run, "--step", "peak"]) == 0
    capsys.readouterr()
    assert main(["timeline", run, "--step", "7"]) == 2
    assert "step 7 was not recorded" in capsys.readouterr().err
    assert main(["timeline", run, "--step", "never"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--max-peak", "host=44GiB", "--max-peak", "device=24GiB"], 0),
        (["--max-peak", "host=42GiB"], 3),
        (["--min-hit-ratio", "0.98", "--max-stall-ratio", "0.25", "--max-non-model", "4GiB", "--max-rss", "46GiB"], 0),
        (["--min-hit-ratio", "0.99"], 3),
        (["--max-stall-ratio", "0.2"], 3),
        (["--max-risk", "0.4"], 3),
        (["--max-risk", "0.45", "--min-steps", "12", "--max-step-seconds", "0.3"], 0),
        (["--min-steps", "13"], 3),
        (["--max-peak", "gpu=3GiB"], 2),
        (["--max-peak", "host=3 bananas"], 2),
        ([], 2),
    ],
)
def test_check_compares_with_thresholds(arguments: list[str], code: int, capsys: Capture) -> None:
    assert main(["check", str(make_run()), *arguments]) == code
    out, err = capsys.readouterr()
    assert bool(err) == (code == 2)
    assert ("FAIL" in out) == (code == 3)


def test_check_of_a_crashed_run_exits_5(capsys: Capture) -> None:
    assert main(["check", str(make_run(status="crashed")), "--min-steps", "1"]) == 5


def test_check_against_an_estimate(tmp_path: Path, capsys: Capture) -> None:
    run = str(make_run())
    file = tmp_path / "estimate.json"
    tiers = {"device": 23 * GIB, "host": 43 * GIB, "disk": 210 * GIB}
    content = {"tiers": {tier: {"model_bytes": n} for tier, n in tiers.items()}, "non_model_bytes": 4 * GIB}
    file.write_text(json.dumps(content))
    assert main(["check", run, "--against-estimate", str(file)]) == 0
    file.write_text(json.dumps({**content, "non_model_bytes": 5 * GIB}))
    assert main(["check", run, "--against-estimate", str(file)]) == 3
    assert "-20.0%" in capsys.readouterr().out
    file.write_text("[]")
    assert main(["check", run, "--against-estimate", str(file)]) == 2


def after(seconds: float, action: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_wait_returns_when_it_is_there_and_not_before() -> None:
    writer = open_run(steps=1)
    run = str(writer.run_dir)
    assert main(["wait", run, "--state", "started"]) == 0
    assert main(["wait", run, "--state", "steady", "--timeout", "0"]) == 3
    timer = after(0.3, lambda: writer.record_step(stats(5)))
    assert main(["wait", run, "--step", "5", "--timeout", "30"]) == 0
    timer.join()
    timer = after(0.3, writer.close)
    assert main(["wait", run, "--timeout", "30"]) == 0
    timer.join()
    assert main(["wait", run, "--step", "6"]) == 3


def test_wait_tells_a_crash(capsys: Capture) -> None:
    assert main(["wait", str(make_run(status="crashed"))]) == 5
    assert main(["wait"]) == 5
    assert "crashed" in capsys.readouterr().err


def test_doctor_looks_at_this_machine(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["doctor", "--json"])
    content = json.loads(capsys.readouterr().out)
    follows(content, "doctor")
    names = {finding["name"]: finding for finding in content["findings"]}
    assert {"torch", "RAM", "cgroup", "threads", "run folder", "telemetry", "locked memory"} <= set(names)
    assert names["threads"]["ok"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert main(["doctor"]) == 3
    assert "set OMP_NUM_THREADS=16" in capsys.readouterr().out
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/no")
    assert main(["doctor"]) == 3
    assert "set XDG_STATE_HOME" in capsys.readouterr().out


def test_schemas_are_valid_and_printed(capsys: Capture) -> None:
    for name, made in (("output", output_schema()), ("records", records_schema())):
        assert main(["schema", name]) == 0
        schema = json.loads(capsys.readouterr().out)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema == made
    assert main(["schema", "nonsense"]) == 2


def test_four_ranks_are_one_run(tmp_path: Path, capsys: Capture) -> None:
    writers = [open_run(10 + rank, tmp_path / "run", rank, 4) for rank in range(4)]
    run = str(tmp_path / "run")
    for rank in range(4):
        content = as_json(capsys, run, "--rank", str(rank))
        assert (content["rank"], content["step"]) == (rank, 10 + rank)
    assert as_json(capsys, run)["rank"] == 0
    assert as_json(capsys, run, "--rank", "worst")["rank"] == 0  # the one that is behind
    writers[2].close("crashed")
    assert as_json(capsys, run, "--rank", "worst", code=5)["rank"] == 2
    assert main([run, "--rank", "9"]) == 4
    assert main([run, "--rank", "best"]) == 2
    for writer in writers:
        writer.close()
    assert len(as_json(capsys, "ls")["runs"]) == 1


def test_a_killed_run_is_shown_as_crashed_at_once(capsys: Capture) -> None:
    code = (
        "import sys, time\nfrom gemini.telemetry.writer import TelemetryWriter\n"
        "w = TelemetryWriter(min_interval_seconds=0)\nw.record_step({'step/count': 3})\n"
        "while w._channel._queue.qsize(): time.sleep(0.001)\n"
        "print(w.run_dir, flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        run = child.stdout.readline().strip()
        assert main([run]) == 0
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        assert main([run]) == 5
        assert "CRASHED" in capsys.readouterr().out
        child.communicate(timeout=30)


def test_hostile_documents_break_no_command(capsys: Capture) -> None:
    run = make_run()
    evil = "\x1b[2J<script>alert(1)</script>../../etc/passwd\u202e"
    content = chunks()
    content["units"] = [evil] * len(UNITS)
    content["parameters"][0]["name"] = evil
    content["chunks"][0] |= {"numel": 10**400, "homes": {"master": evil}, "home_bytes": {"master": -1}, "group": evil}
    content["chunks"].append("text")
    content["config"] = {"max_prefetch": evil}
    few = {**chunks(), "capacities": {"device": {"bytes": 1, "source": "argument"}}}
    for bad_chunks in (json.dumps(content), json.dumps(few), "[" * 100_000, "null", '{"v":1,"chunks":[{}]}'):
        chunks_file(run, 0).write_text(bad_chunks)
        for bad_timeline in (
            json.dumps({"v": 1, **timeline(2), "unit": [10**9] * (MOMENTS + 1)}),
            json.dumps({"v": 1, **timeline(2), "phase": evil}),
            json.dumps({"v": 1, **timeline(2), "device_bytes": ["x"]}),
            json.dumps({"v": 1, "unit": 1e308}),
        ):
            timeline_file(run, 0).write_text(bad_timeline)
            for command in ([], ["top", "--once"], ["chunks"], ["timeline"], ["timeline", "--csv"], ["dmon"]):
                code = main([*command, str(run)])
                out, err = capsys.readouterr()
                assert code in (0, 6), (command, err)
                assert "\x1b" not in out + err
                assert "\u202e" not in out + err


def test_a_document_of_another_minor_version_is_read(capsys: Capture) -> None:
    run = make_run()
    newer = {**chunks(), "v": 1.5, "more": {"a": 1}}
    newer["chunks"][0]["more"] = [None]
    assert "ram_bytes" not in newer  # the first versions did not write it
    chunks_file(run, 0).write_text(json.dumps(newer))
    timeline_file(run, 0).write_text(json.dumps({**timeline(7), "more": 1}))
    assert len(as_json(capsys, "chunks", str(run))["chunks"]) == 64
    assert as_json(capsys, "timeline", str(run))["step"] == 7


def test_a_newer_document_exits_6(capsys: Capture) -> None:
    run = make_run()
    chunks_file(run, 0).write_text(json.dumps({**chunks(), "v": 2}))
    assert main(["chunks", str(run)]) == 6
    assert "update gemini-memory" in capsys.readouterr().err


def test_a_hundred_megabytes_of_records_open_as_fast_as_ten() -> None:
    run = make_run(status=None)
    line = json.dumps({"v": 1, "type": "step", "t": time.time(), "rank": 0, "dropped": 0, "stats": stats(5)}) + "\n"
    with open(records_file(run, 0), "a") as file:
        block = line * 1000
        while file.tell() < 100 << 20:
            file.write(block)
    read_before = _bytes_read()
    assert main(["top", str(run), "--once"]) == 0
    assert _bytes_read() - read_before < 4 << 20  # not by a clock: what is read decides


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar comes first


def test_a_writer_that_is_not_listed_leaves_no_trace(tmp_path: Path, capsys: Capture) -> None:
    TelemetryWriter(tmp_path / "hidden", is_listed=False).close()
    assert (tmp_path / "hidden" / "run.json").exists()
    assert as_json(capsys, "ls")["runs"] == []
