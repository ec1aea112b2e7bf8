"""What gemini-stat shows of several ranks: each command that shows one rank's numbers compares them, or shows one."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ranked_runs import SLOW, STEP_SECONDS, close, numbers, open_ranks, own_seconds, write_on
from stat_runs import GIB, RUN_ID, chunks, open_run, stats, timeline

from gemini.stat.advice import advise_ranks
from gemini.stat.cli import main
from gemini.stat.commands.schema import output_schema
from gemini.stat.over_ranks import OverRanks, Spread, spread
from gemini.telemetry.layout import chunks_file, oom_file, timeline_file
from gemini.telemetry.ranks import read_ranks
from gemini.telemetry.writer import TelemetryWriter

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def writers() -> Iterator[list[TelemetryWriter]]:
    made = open_ranks()
    yield made
    close(made)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished, for tests that change nothing of it."""
    folder = tmp_path_factory.mktemp("still")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        close(open_ranks(folder=folder / "run"))
    return folder / "run"


@pytest.fixture
def run(writers: list[TelemetryWriter]) -> Path:
    assert writers[0].run_dir is not None
    return writers[0].run_dir


def shown(capsys: Capture, *arguments: object, code: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def as_json(capsys: Capture, *arguments: object, name: str, code: int = 0) -> Any:
    content = json.loads(shown(capsys, *arguments, "--json", code=code))
    schema = output_schema()
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]}).validate(content)
    return content


def test_a_spread_names_the_ranks_at_its_ends_and_the_lowest_of_equal_ones() -> None:
    assert spread({0: 3.0, 1: None, 2: 1.0, 5: 3.0, 7: 2.0}) == Spread(1.0, 2.5, 3.0, 2, 0)
    assert spread({0: None}) is None


def test_a_snapshot_compares_the_ranks_in_80_columns(still: Path, capsys: Capture) -> None:
    out = shown(capsys, still)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    for expected in (
        "4 ranks", "straggler rank 2", "1.39 times the median", "min used", "median", "rank of max", "its own part",
        "waiting for ranks", "* 2      finished",
    ):  # fmt: skip
        assert expected in out, expected
    (line,) = [line for line in lines if line.startswith(" device used")]
    assert line.split() == ["device", "used", "20.0", "GiB", "20.5", "GiB", "22.0", "GiB", "2"]
    assert sum(line.split()[1:2] == ["finished"] for line in lines) == 3  # and the straggler with its mark


def test_one_rank_is_shown_by_itself_when_it_is_asked_for(still: Path, capsys: Capture) -> None:
    out = shown(capsys, still, "--rank", "1")
    assert "rank 1 of 4" in out and "21.0 GiB" in out and "median" not in out
    assert f"rank {SLOW} of 4 (worst)" in shown(capsys, still, "-r", "worst")
    assert "median" in shown(capsys, still, "-r", "all")


def test_json_has_all_ranks_and_none_where_one_is_shown_by_itself(still: Path, capsys: Capture) -> None:
    for command, name in (([], "snapshot"), (["top"], "snapshot"), (["dmon"], "dmon")):
        arguments = [*command, still, *(["-c", "1"] if name == "dmon" else [])]
        content = as_json(capsys, *arguments, name=name)
        assert (content["rank"], content["step"], content["status"]) == (0, 12, "finished")
        every = content["all_ranks"]
        middle = sorted(own_seconds(rank) for rank in range(4))[1:3]
        own = every["numbers"]["own_seconds"]
        assert [own["min_rank"], own["max_rank"]] == [0, SLOW]
        assert [own["min"], own["median"], own["max"]] == pytest.approx(
            [own_seconds(0), sum(middle) / 2, own_seconds(SLOW)]
        )
        assert every["straggler"]["rank"] == SLOW
        assert every["numbers"]["host_peak_bytes"] == {
            "min": 40 * GIB, "median": 41.5 * GIB, "max": 43 * GIB, "min_rank": 3, "max_rank": 0,
        }  # fmt: skip
        assert [rank["numbers"]["device_used_bytes"] for rank in every["ranks"]] == [
            numbers(rank)["device/used_bytes"] for rank in range(4)
        ]
        assert every["missing"] == []
        assert as_json(capsys, *arguments, "--rank", "3", name=name)["all_ranks"] is None


@pytest.mark.parametrize("width", [40, 80, 100, 160])
@pytest.mark.parametrize("command", ["top", "show"])
def test_nothing_is_wider_than_the_terminal(
    command: str, width: int, still: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = shown(capsys, *([] if command == "show" else [command]), still, "--once", "--ascii")
    assert max(map(len, out.splitlines())) <= width
    assert out.isascii()


def test_the_live_screen_has_a_line_for_each_rank_and_says_which_rank_the_rest_is_about(
    still: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = shown(capsys, "top", still, "--once")
    for expected in ("ranks 4", "over ranks", "step 2 of rank 0 by moment", "chunks 64 of rank 0", "for chunks"):
        assert expected in out, expected
    assert "moves and waits of rank 0, in 11 steps" in out
    only = shown(capsys, "top", still, "--once", "--only", "ranks")
    assert "straggler rank 2" in only and "^forward" not in only


def test_of_many_ranks_the_screen_shows_those_that_differ(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    writers = open_ranks(12, 3)
    writers[9].close("crashed")
    out = shown(capsys, "top", RUN_ID, "--once", code=5)
    listed = [line.split() for line in out.splitlines() if " running " in line or " crashed " in line]
    assert ["9", "crashed"] in [line[:2] for line in listed]
    assert any(line[:2] == ["*", str(SLOW)] for line in listed)
    assert f"and {12 - len([line for line in listed if line[0] != 'rank'])} more" in out
    assert "rank 9 crashed; ranks 0-8, 10-11 running" in out
    close(writers)


def test_dmon_prints_the_least_the_middle_and_the_most_and_names_the_straggler(still: Path, capsys: Capture) -> None:
    header, least, middle, most = shown(capsys, "dmon", still, "-c", "1", "-s", "tcmbr").splitlines()
    assert "own part" in header
    assert [line.split()[2] for line in (least, middle, most)] == ["min", "median", "max"]
    assert "20.0 GiB" in least and "20.5 GiB" in middle and "22.0 GiB" in most
    assert most.endswith(f"rank {SLOW}") and len(header) == len(least)
    assert "median" not in shown(capsys, "dmon", still, "-c", "1", "-r", "0")


def test_chunks_say_what_each_rank_has_at_home(run: Path, capsys: Capture) -> None:
    few = chunks()
    few["chunks"][3]["home_bytes"] = {"master": GIB}
    few["chunks"][3]["homes"] = {"master": "disk"}
    chunks_file(run, 2).write_text(json.dumps(few))
    header, *rows = shown(capsys, "chunks", run).splitlines()
    assert header.split()[:5] == ["chunk", "state", "min", "homes", "median"]
    assert rows[3].split()[:9] == ["3", "resident", "224.0", "MiB", "224.0", "MiB", "1.0", "GiB", "0.0%"]
    assert "device, disk" in rows[3]
    content = as_json(capsys, "chunks", run, name="chunks")
    assert [each["rank"] for each in content["ranks"]] == [0, 1, 2, 3]
    assert [each["chunks"][3]["home_bytes"] for each in content["ranks"]] == [224 << 20, 224 << 20, GIB, 224 << 20]
    assert as_json(capsys, "chunks", run, "-r", "2", name="chunks")["chunks"][3]["home_bytes"] == GIB


def test_a_timeline_compares_the_peaks_and_shows_one_rank(run: Path, capsys: Capture) -> None:
    higher = timeline(2)
    higher["non_model_bytes"] = [2 * nbytes for nbytes in higher["non_model_bytes"]]
    timeline_file(run, 3).write_text(json.dumps({"v": 1, "t": 0.0, "rank": 3, **higher}))
    out = shown(capsys, "timeline", run)
    assert "step 2 of rank 0 by moment" in out
    assert "peaks of 4 ranks: min 20.5 GiB, median 20.5 GiB, max 25.0 GiB on rank 3" in out
    content = as_json(capsys, "timeline", run, name="timeline")
    assert [peak["peak_bytes"] for peak in content["ranks"]] == [int(20.5 * GIB)] * 3 + [25 * GIB]
    assert {(peak["phase"], peak["unit"]) for peak in content["ranks"]} == {("forward", "ln_f")}
    assert "peaks of" not in shown(capsys, "timeline", run, "-r", "3")


@pytest.mark.parametrize(
    ("arguments", "code", "rank", "value"),
    [
        (["--max-peak", "host=43GiB"], 0, 0, 43 * GIB),
        (["--max-peak", "device=22GiB"], 3, 2, 23 * GIB),
        (["--max-non-model", "4.5GiB"], 3, SLOW, 5 * GIB),
        (["--min-steps", "12"], 0, 0, 12),
        (["--max-peak", "device=22GiB", "--rank", "0"], 0, None, 21 * GIB),
    ],
)
def test_check_looks_at_the_rank_that_is_nearest_to_the_threshold(
    arguments: list[str], code: int, rank: int | None, value: float, still: Path, capsys: Capture
) -> None:
    content = as_json(capsys, "check", still, *arguments, name="check", code=code)
    (found,) = content["checks"]
    assert (found["rank"], found["value"]) == (rank, value)
    if rank is not None:
        assert f"(rank {rank}; min " in found["text"]


def test_check_against_an_estimate_compares_the_fullest_rank(still: Path, tmp_path: Path, capsys: Capture) -> None:
    tiers = {"device": 23 * GIB, "host": 43 * GIB, "disk": 210 * GIB}
    content = {"tiers": {tier: {"model_bytes": n} for tier, n in tiers.items()}, "non_model_bytes": 5 * GIB}
    (tmp_path / "estimate.json").write_text(json.dumps(content))
    out = shown(capsys, "check", still, "--against-estimate", tmp_path / "estimate.json")
    assert "estimated 23.0 GiB (+0.0%), on rank 2" in out


def test_exports_have_all_ranks_and_name_them(still: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = list(csv.DictReader(io.StringIO(shown(capsys, "export", still, "--format", "csv"))))
    assert [int(row["rank"]) for row in rows] == sorted(list(range(4)) * 12)
    assert float(rows[-1]["step/wait_seconds"]) == pytest.approx(STEP_SECONDS - own_seconds(3))
    records = [json.loads(line) for line in shown(capsys, "export", still).splitlines()]
    assert {record["rank"] for record in records} == {0, 1, 2, 3}
    trace = tmp_path / "trace.json"
    said = as_json(capsys, "export", still, "--format", "perfetto", "-o", trace, name="export")
    assert said["ranks"] == [0, 1, 2, 3]
    events = json.loads(trace.read_text())["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [f"rank {rank}" for rank in range(4)]
    assert sum(event.get("cat") == "step" and event["pid"] == 2 for event in events) == 12
    metrics = shown(capsys, "export", still, "--format", "prom")
    assert f'gemini_memory_last_step_rank_wait_seconds{{rank="{SLOW}",run="{RUN_ID}"}} 0.002' in metrics
    assert 'rank="1"' not in shown(capsys, "export", still, "--format", "prom", "-r", "0")


def test_a_step_is_done_when_all_ranks_have_done_it(writers: list[TelemetryWriter], run: Path, capsys: Capture) -> None:
    writers[1].record_step(stats(13, **numbers(1)))
    writers[1].close()
    assert main(["wait", str(run), "--step", "13", "--timeout", "0"]) == 3
    write_on(writers, 13)
    assert main(["wait", str(run), "--step", "13", "--timeout", "30"]) == 0
    assert main(["wait", str(run), "--state", "finished", "--timeout", "0"]) == 3
    writers[2].close("crashed")
    assert main(["wait", str(run), "--state", "finished", "--timeout", "30"]) == 5
    assert "rank 2 crashed" in capsys.readouterr().err


def test_ls_lists_the_ranks_as_one_run(run: Path, capsys: Capture) -> None:
    (line,) = shown(capsys, "ls").splitlines()[1:]
    assert line.split()[:2] == ["RUNNING", "12"]
    (listed,) = as_json(capsys, "ls", name="ls")["runs"]
    assert (listed["world_size"], listed["run_id"]) == (4, RUN_ID)
    assert as_json(capsys, str(os.getpid()), name="snapshot")["run_id"] == RUN_ID


def test_advice_is_about_the_fullest_rank_and_why_one_is_slow(still: Path) -> None:
    over = OverRanks.of(read_ranks(still))
    (straggler,) = advise_ranks([], over)
    assert straggler.text == (
        "the others wait for rank 2, which computes longer: its device is slower, or its batches are larger"
    )


def test_a_rank_that_is_slow_because_its_chunks_are_is_told_so() -> None:
    writers = []
    for rank in range(3):
        own = 0.2 if rank == 1 else 0.1
        writers.append(open_run(0, None, rank, 3))
        for step in range(1, 6):
            waits = {"move/stall_seconds": step * (0.09 if rank == 1 else 0.01), "step/seconds": 0.2}
            writers[-1].record_step(stats(step, **{**waits, "step/wait_seconds": 0.2 - own}))
    close(writers)
    assert writers[0].run_dir is not None
    (straggler,) = advise_ranks([], OverRanks.of(read_ranks(writers[0].run_dir)))
    assert "rank 1, which waits longer for its chunks" in straggler.text


def test_explain_oom_finds_the_rank_whose_memory_ran_out(run: Path, capsys: Capture) -> None:
    tiers = {tier: {"used_bytes": 1, "peak_bytes": 1, "capacity_bytes": 1} for tier in ("device", "host", "disk")}
    document = {
        "v": 1, "t": 0.0, "rank": 3, "error": "OutOfMemory: no room", "is_ours": True, "unit": "h.0",
        "phase": "forward",
        "tiers": tiers, "non_model_peak_bytes": 1, "moments_before": None, "states": "", "in_use": [],
        "process": {"rss_bytes": 1, "free_bytes": 1, "limit": "cgroup v2"}, "last_timeline": None,
    }  # fmt: skip
    oom_file(run, 3).write_text(json.dumps(document))
    content = as_json(capsys, "explain-oom", run, name="explain_oom")
    assert (content["rank"], content["error"]) == (3, "OutOfMemory: no room")


def test_ranks_that_are_not_here_are_named(capsys: Capture) -> None:
    writers = [open_run(2, None, rank, 8) for rank in (0, 1, 5)]
    out = shown(capsys, RUN_ID)
    assert "3 of 8 ranks" in out
    assert "ranks 2-4, 6-7: not begun, or in the file system of another machine" in out
    assert as_json(capsys, RUN_ID, name="snapshot")["all_ranks"]["missing"] == [2, 3, 4, 6, 7]
    close(writers)
