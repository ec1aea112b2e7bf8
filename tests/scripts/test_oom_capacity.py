"""scripts/oom_regression --capacity: how it searches, and that a lack of time is not taken for a lack of memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_SEARCHES = """
import sys
sys.path.insert(0, {oom!r})
from matrix.capacity import NoTimeLeft, search

def slow(number):
    if number > 8:
        raise NoTimeLeft("no time")
    return True

print([
    search(lambda number: number <= 11, 64),
    search(lambda number: False, 64),
    search(lambda number: True, 64),
    search(slow, 64),
])
"""


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


def test_a_search_finds_the_largest_and_says_why_it_may_be_larger() -> None:
    said = run("-c", _SEARCHES.format(oom=str(ROOT / "scripts/oom")))
    assert said.strip() == "[(11, ''), (0, ''), (64, 'the search ends there'), (8, 'no time')]"


@pytest.mark.heavy
def test_a_training_that_is_not_over_in_time_is_not_out_of_memory() -> None:
    said = run(str(ROOT / "scripts/oom"), "--capacity", "layers", "--seconds", "0.1")
    assert "plain PyTorch  0 or more: no time was left for 1 to end" in said
