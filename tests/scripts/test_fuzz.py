"""The fuzzers find nothing in a moment, and do see what they are for."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def fuzz(target: str, tmp_path: Path, seconds: float = 2.0) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "scripts" / "faults"), "fuzz", target, "--seconds", str(seconds)]
    command += ["--failures", str(tmp_path / "failures"), "--json", str(tmp_path / "counts.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (tmp_path / "counts.json").exists(), done.stderr
    counts: dict[str, Any] = json.loads((tmp_path / "counts.json").read_text())
    assert done.returncode == (0 if counts["ok"] else 1)
    return counts


@pytest.mark.timeout(130)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("target", ["checkpoint", "telemetry", "http"])
def test_nothing_crashes_hangs_or_takes_more_memory(target: str, tmp_path: Path) -> None:
    counts = fuzz(target, tmp_path)
    assert counts["ok"], counts["failures"]
    assert counts["inputs"] > 5
    assert not (tmp_path / "failures").exists()


CHILDREN = {
    "is killed": ("os.kill(os.getpid(), 11)", "crashes"),
    "ends with an error": ("raise SystemExit(3)", "crashes"),
    "hangs": ("threading.Event().wait(60)", "hangs"),
    "reports a crash": ("say('ValueError: x', True)", "crashes"),
    "runs out of memory": ("say('MemoryError: ', True)", "above_memory_limit"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CHILDREN)
def test_what_goes_wrong_is_counted_and_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "faults"))
    fuzz = importlib.import_module("fuzz")
    code, count = CHILDREN[name]
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, pathlib, sys, threading\n"
        "def say(outcome, is_bad):\n"
        "    line = dict(what='x', outcome=outcome, is_bad=is_bad, peak_mib=1)\n"
        "    print(json.dumps(line), flush=True)\n"
        "pathlib.Path(sys.argv[2], 'current').write_text('input')\n"
        f"say('fine', False)\n{code}\n"
    )
    monkeypatch.setattr(fuzz, "CHILD", child)
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 1.0)
    monkeypatch.setattr(sys, "path", [sys.path[0], str(ROOT / "tests"), str(ROOT), *sys.path[1:]])
    found = fuzz.Found(tmp_path / "failures")
    fuzz._one_child("http", 0, 1.0, found)
    counts = {"crashes": found.crashes, "hangs": found.hangs, "above_memory_limit": found.above_limit}
    assert counts == {**dict.fromkeys(counts, 0), count: 1}
    assert found.first_failures
    if "say" not in code:
        assert (tmp_path / "failures" / "lost-0" / "input").read_text() == "input"
