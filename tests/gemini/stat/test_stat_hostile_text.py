"""A run whose every text steers terminals, reorders lines and is code elsewhere: all that is printed is plain text."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hostile_runs import HOSTILE
from stat_runs import make_run, open_run

from gemini.lease.asked import Asked
from gemini.stat.cli import main
from gemini.telemetry.layout import chunks_file, oom_file, records_file, start_file, timeline_file

Capture = pytest.CaptureFixture[str]
COMMANDS = (
    "ls", "ls --json", "RUN -1", "RUN --json", "top RUN -1", "top RUN --json", "top RUN -1 --ascii", "dmon RUN -c 1",
    "dmon RUN -c 1 --json", "chunks RUN", "chunks RUN --json", "timeline RUN", "timeline RUN --json",
    "timeline RUN --csv", "timeline RUN --step peak", "check RUN --max-risk 0.5", "wait RUN --timeout 0", "export RUN",
    "export RUN --format csv", "export RUN --format prom", "export RUN --format perfetto", "RUN -r all", "RUN -r worst",
    "RUN -r 0", "wait RUN --json", "check RUN --max-risk 0.5 --json", "lease", "lease --json", "lease RUN",
)  # fmt: skip


def hostile(content: Any, key: str = "") -> Any:
    """All texts of a document, and all names that are not ours."""
    if isinstance(content, dict):
        return {name: hostile(value, name) for name, value in content.items()}
    if isinstance(content, list):
        return [hostile(value) for value in content]
    ours = ("type", "states", "phase", "tier", "status", "limit", "source") if key != "limit" else ()
    return (
        HOSTILE
        if isinstance(content, str) and key not in ours and content not in ("device", "host", "disk")
        else content
    )


def hostile_run(status: str = "crashed") -> Path:
    run = make_run(status=status)
    with_facts = json.loads((run / "run.json").read_text())
    with_facts["facts"] = {HOSTILE: HOSTILE, "model": HOSTILE, "group": {HOSTILE: HOSTILE}, "list": [HOSTILE]}
    (run / "run.json").write_text(json.dumps(hostile(with_facts)))
    start_file(run, 0).unlink()
    lines = [json.loads(line) for line in records_file(run, 0).read_bytes().splitlines() if line]
    for line in lines:
        if line["type"] == "step":
            line["stats"] |= {HOSTILE: 1.0, "=1+1": 2.0, " @x": 3.0, "\n-1": 4.0}
        if line["type"] == "end":
            line["error"] = HOSTILE
    records_file(run, 0).write_text("".join(json.dumps(hostile(line)) + "\n" for line in lines))
    chunks = json.loads(chunks_file(run, 0).read_text())
    text = HOSTILE.replace("\ud800", "")  # the struct of a document takes no text that is none
    chunks["units"] = [f"{text} {i}" for i in range(len(chunks["units"]))]
    for index, parameter in enumerate(chunks["parameters"]):
        parameter["name"] = f"={text} {index}"
    for chunk in chunks["chunks"]:
        chunk["group"] = text
    chunks_file(run, 0).write_text(json.dumps(chunks))
    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_only_plain_text_is_printed(command: str, capsys: Capture) -> None:
    run = hostile_run()
    code = main([str(run) if word == "RUN" else word for word in command.split()])
    shown = capsys.readouterr()
    assert code in (0, 3, 4, 5), shown.err
    text = shown.out + shown.err
    odd = {char for char in text if not char.isprintable() and char != "\n"}
    assert odd == ({"\r"} if "csv" in command else set())
    if command.endswith("--json"):
        json.loads(shown.out)


def test_the_csv_has_no_formulas(capsys: Capture) -> None:
    run = hostile_run()
    for command in (["export", "--format", "csv"], ["timeline", "--csv"]):
        assert main([*command, str(run)]) == 0
        for row in csv.reader(io.StringIO(capsys.readouterr().out)):
            texts = [cell for cell in row if not _is_number(cell)]
            assert not [cell for cell in texts if cell.strip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20")], texts


def test_the_name_of_a_unit_at_the_end_of_a_step_is_plain_text(capsys: Capture) -> None:
    run = hostile_run()
    content = json.loads(timeline_file(run, 0).read_text())
    content["non_model_bytes"][-1] = 1 << 60
    content["unit"][-1] = 0  # the moment after the last unit says that it is of one
    timeline_file(run, 0).write_text(json.dumps(content))
    for command in (["timeline"], ["top", "-1"]):
        assert main([*command, str(run)]) in (0, 5)
        out = capsys.readouterr().out
        assert "peak at" in out or command == ["top", "-1"]
        assert not {char for char in out if not char.isprintable() and char != "\n"}


def test_a_metric_stays_on_its_line(capsys: Capture) -> None:
    assert main(["export", str(hostile_run()), "--format", "prom"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("#", "gemini_memory_")) for line in lines)
    assert any('name="' in line for line in lines)


def test_an_error_that_ran_out_of_memory_is_explained_in_plain_text(capsys: Capture) -> None:
    pytest.importorskip("torch")
    run = hostile_run()
    tiers = {tier: {"used_bytes": 1, "peak_bytes": 1, "capacity_bytes": 1} for tier in ("device", "host", "disk")}
    text = HOSTILE.replace("\ud800", "")
    process = {"rss_bytes": 1, "free_bytes": 1, "limit": text}
    content = {
        "v": 1, "t": 0.0, "rank": 0, "error": text, "is_ours": True, "unit": text, "phase": "forward", "tiers": tiers,
        "non_model_peak_bytes": 1, "moments_before": None, "states": "1d", "in_use": [0], "process": process,
        "last_timeline": None,
    }  # fmt: skip
    oom_file(run, 0).write_text(json.dumps(content))
    for command in (["explain-oom", str(run)], ["explain-oom", str(run), "--json"]):
        main(command)
        shown = capsys.readouterr()
        assert not {char for char in shown.out + shown.err if not char.isprintable() and char != "\n"}
        assert "red" in shown.out


def test_an_answer_of_a_run_is_plain_text(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemini.lease.folder import LeaseFolder
    from gemini.lease.standing import Answer, Standing
    from gemini.stat.commands import lease

    said = Standing(job="j", program=HOSTILE, pid=1, started=0.0, answer=Answer("id", True, HOSTILE))
    monkeypatch.setattr(lease, "_leases_of", lambda target, machine: {"1-x": said})
    monkeypatch.setattr(LeaseFolder, "ask", lambda *_: None)
    monkeypatch.setattr(LeaseFolder, "standings", lambda self: {"1-x": said})
    monkeypatch.setattr(Asked, "of", classmethod(lambda cls, **sizes: Asked(id="id", **sizes)))
    assert main(["lease", "x", "--host", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("now\n")
    assert not {char for char in out if not char.isprintable() and char != "\n"}


def test_the_screen_of_a_living_run_is_plain_text(capsys: Capture) -> None:
    writer = open_run()
    try:
        assert writer.run_dir is not None
        content = json.loads((writer.run_dir / "run.json").read_text())
        content["facts"] = {"steps": HOSTILE, HOSTILE: 1}
        (writer.run_dir / "run.json").write_text(json.dumps(content))
        start = json.loads(start_file(writer.run_dir, 0).read_text())
        start_file(writer.run_dir, 0).write_text(json.dumps({**start, "host": HOSTILE, "name": HOSTILE}))
        for command in (["top", "-1"], ["-1"], ["ls"]):
            main([*command, *([str(writer.run_dir)] if command != ["ls"] else [])])
            out = capsys.readouterr().out
            assert not {char for char in out if not char.isprintable() and char != "\n"}
    finally:
        writer.close()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_names_of_folders_are_text(tmp_path: Path, capsys: Capture) -> None:
    name = "\x1b[31m\n\u202e\udcff"
    odd = Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/" + name.encode("utf-8", "surrogateescape")))
    odd.mkdir()
    make_run(folder=odd / "run")
    (odd / "bad").mkdir()
    (odd / "bad" / "run.json").write_text("[")
    for command in (["ls"], ["ls", "--json"], ["-1"], ["--json"], ["chunks"], ["wait", "--timeout", "0"]):
        main([*command, str(odd)])
        shown = capsys.readouterr()
        assert not {char for char in shown.out + shown.err if not char.isprintable() and char != "\n"}
