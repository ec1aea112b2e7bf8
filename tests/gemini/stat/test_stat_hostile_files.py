"""Whatever lies in a run's folder in the place of its files, the commands end, say why, and show the other runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile_runs import KINDS, spoil
from stat_runs import make_run

from gemini.stat.cli import main
from gemini.stat.console import Exit
from gemini.telemetry.layout import chunks_file, lock_file, oom_file, records_file, start_file, timeline_file

Capture = pytest.CaptureFixture[str]
EXPECTED = {int(code) for code in (Exit.OK, Exit.USAGE, Exit.NO_RUN, Exit.BAD_RUN, Exit.UNREADABLE, Exit.NEGATIVE)}
FILES = {
    "run.json": lambda run: run / "run.json",
    "records": lambda run: records_file(run, 0),
    "start": lambda run: start_file(run, 0),
    "chunks": lambda run: chunks_file(run, 0),
    "timeline": lambda run: timeline_file(run, 0),
    "oom": lambda run: oom_file(run, 0),
    "lock": lambda run: lock_file(run, 0),
}
LIMITED = """
import resource, sys
from gemini.stat.cli import main
resource.setrlimit(resource.RLIMIT_DATA, (400 << 20, 400 << 20))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.one_in(8)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_told_or_left_out(kind: str, file: str, tmp_path: Path, capsys: Capture) -> None:
    run, good = make_run(), make_run()
    spoil(FILES[file](run), kind)
    commands = [["ls"], ["ls", "--json"], [str(run)], [str(run), "--json"], ["top", "-1", str(run)]]
    commands += [["dmon", "-c", "1", str(run)], ["chunks", str(run)], ["timeline", str(run)]]
    commands += [["export", str(run), "--format", f, "-o", str(tmp_path / f)] for f in ("prom", "csv", "perfetto")]
    commands += [["export", str(run), "-o", str(tmp_path / "l")], ["report", str(run), "-o", str(tmp_path / "r")]]
    for command in commands:
        code = main(command)
        shown = capsys.readouterr()
        assert code in EXPECTED, (command, code, shown.err)
        if command == ["ls", "--json"]:
            found = json.loads(shown.out)
            assert str(good) in [each["path"] for each in found["runs"]]
            told = [each["path"] for each in found["runs"] + found["unreadable"]]
            assert sorted(told) == sorted(map(str, (run, good)))


def test_an_unreadable_run_is_listed_with_the_reason(capsys: Capture) -> None:
    run, good = make_run(), make_run()
    spoil(run / "run.json", "1 GB of nothing")
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(good.name in line for line in lines)
    assert any("UNREADABLE" in line and run.name in line and "more than" in line for line in lines)
    spoil(good / "run.json", "a pipe")
    assert main(["ls"]) == 0
    assert capsys.readouterr().out.count("UNREADABLE") == 2


def test_where_no_run_can_be_read_the_reason_is_said(capsys: Capture) -> None:
    spoil(make_run() / "run.json", "a pipe")
    assert main([]) == Exit.NO_RUN
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.one_in(4)
@pytest.mark.parametrize("file", ["run.json", "records", "start", "chunks", "timeline"])
@pytest.mark.parametrize("kind", ["1 GB of nothing", "a line of 1 GB", "a million lists", "10 million lines"])
def test_no_file_takes_much_memory(kind: str, file: str, tmp_path: Path) -> None:
    run = make_run()
    spoil(FILES[file](run), kind)
    commands: list[list[Any]] = [["ls"], [run, "--json"], ["export", run, "-o", tmp_path / "out"]]
    commands += [["report", run, "-o", tmp_path / "r"]]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, *map(str, command)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode in EXPECTED, done.stderr
        assert "MemoryError" not in done.stderr


def test_what_bench_measured_may_be_anything(capsys: Capture) -> None:
    from gemini.stat.rates import hardware_file

    run = make_run()
    for kind in KINDS:
        if hardware_file().is_dir():
            hardware_file().rmdir()
        spoil(hardware_file(), kind)
        assert main(["top", "-1", str(run)]) == 0, kind
        capsys.readouterr()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a pipe"])  # a shell's pipe is waited for
def test_an_estimate_to_compare_with_may_be_anything(kind: str, tmp_path: Path, capsys: Capture) -> None:
    run, file = make_run(), tmp_path / "estimate"
    spoil(file, kind)
    assert main(["check", str(run), "--against-estimate", str(file)]) == Exit.USAGE
    capsys.readouterr()


@pytest.mark.parametrize("target", ["x" * 5000, "a/" * 3000, "\udcff", "../" * 500, "-1", "0"])
def test_an_odd_target_is_no_run(target: str, capsys: Capture) -> None:
    make_run()
    assert main([f"./{target}"]) == Exit.NO_RUN
    assert main(["ls", f"./{target}"]) == Exit.OK
    capsys.readouterr()


def test_a_folder_that_may_not_be_read_hides_no_other_run(capsys: Capture) -> None:
    run, good = make_run(), make_run()
    hidden = run.with_name("hidden")
    run.rename(hidden)
    run.symlink_to(hidden / ("x" * 300))  # impossible to look at, for root too
    assert main(["ls"]) == 0
    assert good.name in capsys.readouterr().out


def test_more_ranks_than_any_run_has_are_refused(capsys: Capture) -> None:
    run, good = make_run(), make_run()
    for rank in range(1, 20_000):
        records_file(run, rank).touch()
    assert main(["ls"]) == 0
    out = capsys.readouterr().out
    assert good.name in out
    assert any(run.name in line and "UNREADABLE" in line for line in out.splitlines())
