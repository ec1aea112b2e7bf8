"""Mutated files of all kinds: a `CheckpointError` that names the file, or the same values; nothing is half loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_cases import child
from mutated_loads import SUBJECTS, bad, outcomes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_few_mutated_files_of_each_kind_are_refused_or_harmless(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    subjects = tuple(subject for subject in SUBJECTS if subject.name != "adapter")
    found = outcomes(tmp_path, 90, seed=0, subjects=subjects)
    assert not bad(found)
    assert {"refused", "the same values"} <= {outcome for _, outcome in found}


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_a_thousand_mutated_files_are_refused_or_harmless_under_a_limit_of_memory(tmp_path: Path) -> None:
    done = child("child_mutations.py", tmp_path, 1000, 3, timeout=590)
    print(done.stdout)


def test_the_judge_sees_what_is_loaded_without_checksums(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    unverified = replace(SUBJECTS[0], load=lambda run, path: run.booster.load_model(run.model, path, verify=False))
    assert any("wrong values" in each for each in bad(outcomes(tmp_path, 30, seed=0, subjects=(unverified,))))
