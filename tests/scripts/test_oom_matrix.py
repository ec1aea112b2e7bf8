"""The matrix of scripts/oom: its selection, and that mistakes in the product make its cases fail."""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SABOTAGE = Path(__file__).with_name("sabotage.py")

_PROOFS = """
import json, sys
sys.path.insert(0, {oom!r})
from matrix.cases import named
from matrix.keeper import Keeper
from matrix.proof import measure, prove

case = named({case!r})
with Keeper() as keeper:
    known = measure(keeper, case, {attempts})
    for sabotage in {sabotages!r}:
        report = prove(keeper, case, known, sabotage, attempts={attempts})
        print(json.dumps([[check.what, check.got, check.expected] for check in report.checks if not check.passed]))
"""


def failed_checks(case: str, *sabotages: str | None, attempts: int = 2) -> list[list[str]]:
    """What fails of a case, against a baseline from the same moment: for each kind of sabotage the failed checks."""
    places = [name and f"{SABOTAGE}:{name}" for name in sabotages]
    program = _PROOFS.format(oom=str(ROOT / "scripts/oom"), case=case, sabotages=places, attempts=attempts)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return [[what for what, _, _ in json.loads(line)] for line in done.stdout.splitlines()]


UNCOUNTED = "full copies have, beside what is counted for them"
RING = "gpt-static-ring-fp32-lazy-1-keep"


LEAKED = {"at rest, beside what the ledger counts", "left when the model is gone"}


def test_a_leak_of_one_chunk_makes_a_case_fail_and_its_other_checks_pass() -> None:
    (leaking,) = failed_checks(RING, "leak_a_chunk_for_good", attempts=1)
    assert LEAKED <= set(leaking) <= {*LEAKED, "peak of the resident set"}


@pytest.mark.heavy
def test_a_case_passes() -> None:
    assert failed_checks(RING, None) == [[]]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sabotage", "shown_by"),
    [
        ("leak_a_full_copy", UNCOUNTED),
        ("enlarge_full_copies", "at rest, beside what the ledger counts"),
        ("forget_to_unpin", "chunks in use after the last step"),
    ],
)
def test_a_mistake_in_the_product_makes_a_case_fail(sabotage: str, shown_by: str) -> None:
    (failed,) = failed_checks(RING, sabotage)
    assert shown_by in failed


@pytest.mark.heavy
@pytest.mark.parametrize(
    "case",
    [
        "gpt-static-device-fp32-lazy-1-offload",
        "moe-static-disk-fp32-eager-1-recompute",
        "gpt-static-device-fp32-lazy-2-keep",
        "llama-static-ram-bf16-lazy-2-keep",
    ],
)
def test_a_leak_of_one_chunk_is_seen_in_other_cases(case: str) -> None:
    """Also where it is less than the noise of a peak, as with two ranks."""
    passed, leaking = failed_checks(case, None, "leak_a_full_copy", attempts=1)
    assert UNCOUNTED not in passed and UNCOUNTED in leaking


def listed(*arguments: str) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/oom"), "--list", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    names = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    return [name.split("-") for name in names]


def test_each_pair_that_can_occur_is_among_the_selected_cases() -> None:
    every, selected = listed("--all"), listed()
    pairs = [
        {(i, case[i], k, case[k]) for case in of for i, k in combinations(range(7), 2)} for of in (every, selected)
    ]
    assert pairs[0] == pairs[1]
    assert len(selected) < 25 < len(every)
