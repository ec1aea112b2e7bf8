"""Pipes, devices and folders in the place of a checkpoint's files: refused at once, and nothing is loaded."""

import os
import shutil
from itertools import cycle
from pathlib import Path

import pytest
from mutated_loads import SUBJECTS, Judge

from gemini.stat.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
TRIED = ("model", "optimizer", "optimizer.pt", "scheduler", "checkpoint")
KINDS = {
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "1 TB of nothing": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.name in TRIED], ids=lambda subject: subject.name)
def test_what_is_no_file_is_refused(subject, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    judge = Judge(subject, tmp_path, seed=0)
    kinds = cycle(KINDS.items())
    for name in judge.files:
        kind, make = next(kinds)
        shutil.rmtree(judge.tried, ignore_errors=True)
        shutil.copytree(judge.good, judge.tried, symlinks=True)
        path = judge.tried / name
        path.unlink()
        make(path)
        outcome = judge._outcome(path, may_be_another=False)
        is_left_out = name.name == "config.json"
        may_be_whole = is_left_out or kind == "a folder"  # with whatever name: verify looks into it
        assert outcome == "refused" or (is_left_out and outcome == "the same values"), (name, kind, outcome)
        assert main(["verify", str(judge.tried)]) in ((0, 3, 6) if may_be_whole else (3, 6)), (name, kind)
        capsys.readouterr()
