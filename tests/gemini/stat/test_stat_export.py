"""gemini-stat export: for Prometheus, as a table, as a trace."""

import csv
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
from stat_runs import GIB, MOMENTS, make_run, open_run

from gemini.stat.cli import main
from gemini.stat.metrics import exposition
from gemini.telemetry.reader import read_run

Capture = pytest.CaptureFixture[str]


def test_records_come_out_as_they_went_in(capsys: Capture) -> None:
    assert main(["export", str(make_run())]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[0]["type"] == "start" or records[1]["type"] == "start"
    assert sum(record["type"] == "step" for record in records) == 12


def test_steps_as_a_table(capsys: Capture) -> None:
    assert main(["export", str(make_run()), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [int(float(row["step/count"])) for row in rows] == list(range(1, 13))
    assert float(rows[0]["host/used_bytes"]) == 41 * GIB


def test_a_trace_for_perfetto(tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "trace.json"
    assert main(["export", str(make_run()), "--format", "perfetto", "-o", str(target), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == target.stat().st_size
    events = json.loads(target.read_text())["traceEvents"]
    assert sum(event.get("cat") == "step" for event in events) == 12
    assert sum(event["name"] == "one step by moment (bytes)" for event in events) == MOMENTS + 1
    for event in events:
        assert event["ph"] in "MCX"
        assert all(isinstance(value, int | float) for value in event.get("args", {}).values()) or event["ph"] == "M"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_metrics_of_all_ranks_with_their_values(tmp_path: Path, capsys: Capture) -> None:
    writers = [open_run(10, tmp_path / "run", rank, 2) for rank in range(2)]
    assert main(["export", str(tmp_path / "run"), "--format", "prom"]) == 0
    text = capsys.readouterr().out
    run_id = read_run(tmp_path / "run").identity.run_id
    for rank in range(2):
        labels = f'rank="{rank}",run="{run_id}"'
        assert f'gemini_memory_tier_used_bytes{{{labels},tier="host"}} {41 * GIB:.12g}'.split("}")[0] in text
        assert f"gemini_memory_steps_total{{{labels}}} 10.0" in text
        assert re.search(rf'gemini_memory_needs_total{{outcome="hit",{labels}}} 1880.0', text)
        assert f'gemini_memory_run_status{{{labels},status="running"}} 1.0' in text
    for name in re.findall(r"^# TYPE (\S+) counter", text, re.M):
        assert name.endswith("_total")
    for writer in writers:
        writer.close()


def test_a_textfile_for_node_exporter_is_put_in_place_whole(tmp_path: Path) -> None:
    folder = tmp_path / "textfile"
    folder.mkdir()
    assert main(["export", str(make_run()), "--format", "prom", "--textfile", str(folder)]) == 0
    (file,) = folder.iterdir()
    assert file.suffix == ".prom"
    assert "gemini_memory_oom_risk_ratio" in file.read_text()
    assert main(["export", str(make_run()), "--format", "csv", "--textfile", str(folder)]) == 2
    assert main(["export", str(make_run()), "-o", "/proc/no/file"]) == 2


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_promtool_finds_nothing_to_complain_about() -> None:
    run = make_run()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition(lambda: [read_run(run)]), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr + done.stdout) == (0, b"")


def test_the_dashboard_and_the_rules_use_metrics_that_exist() -> None:
    text = exposition(lambda: [read_run(make_run(**{"step/wait_seconds": 0.01}))]).decode()
    known = set(re.findall(r"^(gemini_memory_\w+)", text, re.M))
    folder = files("gemini.stat").joinpath("grafana")
    dashboard = folder.joinpath("dashboard.json").read_text()
    rules = folder.joinpath("alerts.yml").read_text()
    assert len(json.loads(dashboard)["panels"]) >= 6
    for source in (dashboard, rules):
        used = set(re.findall(r"gemini_memory_\w+", source))
        assert used
        assert used <= known, used - known
