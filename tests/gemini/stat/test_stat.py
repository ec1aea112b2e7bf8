"""``gemini-stat`` as people and scripts use it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gemini.stat.cli import main
from gemini.telemetry.layout import records_file, runs_folder
from gemini.telemetry.writer import TelemetryWriter

GIB = 1 << 30
STATS: dict[str, float] = {
    "step/count": 412,
    "step/seconds": 0.214,
    "device/used_bytes": 20 * GIB,
    "device/peak_bytes": 23 * GIB,
    "device/capacity_bytes": 24 * GIB,
    "host/used_bytes": 41 * GIB,
    "host/peak_bytes": 43 * GIB,
    "host/capacity_bytes": 64 * GIB,
    "disk/used_bytes": 0,
    "disk/peak_bytes": 0,
    "disk/capacity_bytes": 0,
    "chunk/count": 640,
    "chunk/numel": 1 << 24,
    "chunk/waste_ratio": 0.018,
    "chunk/device_count": 96,
    "chunk/host_count": 544,
    "chunk/disk_count": 0,
    "chunk/resident_count": 120,
    "model_data/total_bytes": 103 * GIB,
    "model_data/parameter_bytes": 13 * GIB,
    "model_data/gradient_bytes": 13 * GIB,
    "model_data/optimizer_bytes": 77 * GIB,
    "non_model/peak_bytes": 4 * GIB,
    "move/fetch_count": 37492,
    "move/fetch_bytes": 2300 * GIB,
    "move/prefetch_count": 34608,
    "move/prefetch_hit_ratio": 0.954,
    "move/evict_count": 34607,
    "move/disk_read_bytes": 0,
    "move/disk_write_bytes": 0,
    "move/stall_seconds": 7.4,
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def make_run(stats: dict[str, float] | None = None, status: str = "finished", **facts: object) -> Path:
    telemetry = TelemetryWriter(facts=facts, min_interval_seconds=0)
    telemetry.record_step(STATS if stats is None else stats)
    run = telemetry.run_dir
    assert run is not None
    telemetry.close(status)
    return run


def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "gemini.stat", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_snapshot_shows_every_number_in_80_columns_and_24_lines(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(model="GPT", precision="bf16", placement_policy="auto")
    assert main([]) == 0
    out, err = capsys.readouterr()
    for shown in (
        "FINISHED", "step 412", "0.21 s/step", "20.0 GiB", "24.0 GiB", "83%", "23.0 GiB", "41.0 GiB", "64%",
        "640 of 16.8 M elements", "1.8% waste", "120 copies on device", "96 on device", "544 on host", "0 on disk",
        "13.0 GiB parameters", "13.0 GiB gradients", "77.0 GiB optimizer", "103.0 GiB in all", "4.0 GiB at its peak",
        "37,492 fetches", "2.2 TiB fetched", "95.4% prefetch hits", "34,607 evictions", "7.40 s stalled", "bf16",
    ):  # fmt: skip
        assert shown in out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert all(line == line.rstrip() for line in lines)
    assert "no run is live" in err


def test_facts_are_shown_by_name_also_those_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(parameters=1_300_000_000, capacities={"host": "80% of RAM", "device": None}, offload_dir=None, lazy=True)
    main([])
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["parameters", "1.3", "G"] in out
    assert ["capacities.host", "80%", "of", "RAM"] in out
    assert ["lazy", "True"] in out
    assert not any(line[:1] == ["offload_dir"] for line in out)


def test_unknown_numbers_are_shown_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    make_run({"step/count": 1, "device/used_bytes": 5})
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "- prefetch hits" in out
    assert "5 B" in out
    assert "None" not in out


def test_a_run_before_its_first_step_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = TelemetryWriter()
    assert main([]) == 0
    assert "no step recorded yet" in capsys.readouterr().out
    telemetry.close()


def test_a_nearly_full_tier_is_marked_without_colour(capsys: pytest.CaptureFixture[str]) -> None:
    make_run({**STATS, "device/used_bytes": 23.9 * GIB})
    main([])
    assert "100% !" in capsys.readouterr().out


def test_one_ram_for_device_and_host_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    make_run({**STATS, "memory/unified": 1})
    main([])
    assert "device and host are one RAM" in capsys.readouterr().out


def test_a_crashed_run_is_printed_and_exits_5(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(status="crashed")
    assert main([str(run)]) == 5
    assert "CRASHED" in capsys.readouterr().out
    assert main([str(run), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["status"] == "crashed"


def test_json_has_the_same_fields_for_a_full_and_an_empty_run(capsys: pytest.CaptureFixture[str]) -> None:
    def shape(value: Any) -> Any:
        return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else None

    make_run()
    main(["--json"])
    full = json.loads(capsys.readouterr().out)
    assert full["schema_version"] == 1
    assert full["tiers"]["device"] == {
        "used_bytes": 20 * GIB,
        "peak_bytes": 23 * GIB,
        "capacity_bytes": 24 * GIB,
        "used_ratio": 20 / 24,
    }
    assert full["move"]["prefetch_hit_ratio"] == 0.954
    assert full["step"] == 412
    empty_run = make_run({"unknown/key": 1})
    main([str(empty_run), "--json"])
    empty = json.loads(capsys.readouterr().out)
    assert shape(empty) == shape(full)
    assert empty["chunk"] == dict.fromkeys(full["chunk"])


def test_ls_lists_runs_newest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    out, err = capsys.readouterr()
    assert (out, "no runs in" in err) == ("", True)
    older, newer = make_run(), make_run(status="crashed")
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [name in line for name, line in zip(("status", newer.name, older.name), lines, strict=True)] == [True] * 3
    assert max(map(len, lines)) <= 80
    assert main(["ls", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert [run["run_id"] for run in listing["runs"]] == [newer.name, older.name]
    assert listing["schema_version"] == 1


@pytest.mark.parametrize("target", [[], ["top"], ["chunks"], ["12345"], ["/nonexistent"], ["tpo"]])
def test_no_run_exits_4_and_says_so(target: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(target) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "no run found" in err
    assert main([*target, "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["code"] == 4


def test_a_rank_that_does_not_exist_exits_4(capsys: pytest.CaptureFixture[str]) -> None:
    make_run()
    assert main(["--rank", "7"]) == 4
    assert "no rank 7" in capsys.readouterr().err


def test_newer_telemetry_exits_6(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    with open(records_file(run, 0), "a") as file:
        file.write('{"v":2,"type":"step"}\n')
    assert main([str(run)]) == 6
    assert "update gemini-memory" in capsys.readouterr().err


def test_wrong_usage_exits_2() -> None:
    assert main(["--nonsense"]) == 2


def test_an_internal_error_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_run()
    monkeypatch.setattr("gemini.stat.sight.read_ranks", lambda *_: 1 / 0)
    assert main([]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_strings_from_files_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07\r\n[bold red]x[/] :smile: \u202egnp\u2028"
    run = make_run(**{"model\x1b[31m": hostile})
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**content, "name": hostile}))
    for arguments in ([], ["ls"], ["--color", "always"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "\x1b[2J" not in out
        assert "\x1b]" not in out
        assert "\x1b[31mm" not in out
        for char in "\x07\r\u202e\u2028":
            assert char not in out
    main([])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold red]x[/] :smile:" in out
    main(["--json"])
    assert capsys.readouterr().out.isascii()


def test_absurd_numbers_do_not_break_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    make_run({key: (-1 if index % 2 else 2**62) for index, key in enumerate(STATS)})
    assert main([]) == 0
    make_run({**STATS, "device/used_bytes": 500 * GIB}, huge=10**400, nested={"a": {"b": [1]}})
    assert main([]) == 0
    capsys.readouterr()


def test_a_pipe_gets_no_escapes_and_colour_can_be_forced() -> None:
    run = str(make_run())
    assert "\x1b" not in command(run).stdout
    assert "\x1b[" in command(run, "--color", "always").stdout
    assert "\x1b[" in command(run, FORCE_COLOR="1").stdout
    assert "\x1b" not in command(run, FORCE_COLOR="1", NO_COLOR="1").stdout
    assert "\x1b" not in command(run, "--color", "never", FORCE_COLOR="1").stdout


def test_a_terminal_without_unicode_gets_ascii() -> None:
    run = str(make_run(model="mödel"))
    done = command(run, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert "####" in done.stdout


def test_a_closed_pipe_ends_quietly() -> None:
    run = str(make_run())
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "gemini.stat", run], stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_it_never_imports_torch() -> None:
    run = str(make_run())
    code = (
        "import sys\nfrom gemini.stat.cli import main\n"
        f"main([{run!r}]); main(['ls']); main([{run!r}, '--json'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'numba')))"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60, check=True)


def test_it_starts_in_half_a_second() -> None:
    # Of processor time, which the tests beside this one do not lengthen; on a quiet machine that is the time it takes.
    assert min(_processor_seconds("--version") for _ in range(3)) < 0.5
    run = str(make_run())
    assert min(_processor_seconds(run) for _ in range(3)) < 0.5


def _processor_seconds(*arguments: str) -> float:
    child = subprocess.Popen([sys.executable, "-m", "gemini.stat", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_help_names_examples_and_exit_codes_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "exit codes:" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_version_names_python_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert "torch 2" in capsys.readouterr().out


def test_many_runs_are_listed_quickly() -> None:
    for _ in range(50):
        make_run()
    assert len(list(runs_folder().iterdir())) == 50
    begin = time.perf_counter()
    assert main(["ls"]) == 0
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("columns", ["80", "40", None])
def test_ids_are_whole_in_pipes_and_in_80_columns(
    columns: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run()
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["ls"]) == 0
    piped = capsys.readouterr().out
    assert made.name in piped
    if columns == "80":
        assert main(["ls", "--color", "always"]) == 0
        shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert made.name in shown and max(map(len, shown.splitlines())) <= 80
