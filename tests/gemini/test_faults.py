"""A few of the operations of which `scripts/faults` has each one fail: training goes on bit for bit."""

import gc
from pathlib import Path

import pytest
from fault_sites import ALLOCATIONS, DISK
from faulty_steps import SETTINGS, Broken, Outcome, run_boosts, run_first_steps, run_steps

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

RUNS = {"step": run_steps, "first step": run_first_steps, "boost": run_boosts}
SITES = {**ALLOCATIONS, **DISK}
of_the_interpreter = pytest.mark.skipif("interpreter" not in ALLOCATIONS, reason="this Python has no _testcapi")


@pytest.mark.parametrize(
    ("setting", "what", "site", "every"),
    [
        ("resident, fp32", "step", "tensors", 51),
        ("resident, fp32", "step", "python", 2),
        ("streamed, fp32", "step", "tensors", 51),
        ("streamed, bf16", "step", "python", 2),
        ("disk, fp32", "step", "python", 47),
        ("disk, fp32", "first step", "EIO", 29),
        ("disk, bf16", "step", "spoils", 13),
        pytest.param("resident, fp32", "step", "interpreter", 1201, marks=of_the_interpreter),
        ("disk, fp32", "boost", "threads", 5),
        ("disk, fp32", "boost", "EMFILE", 3),
        ("activations, fp32", "step", "tensors", 61),
        ("activations, fp32", "step", "short", 61),
        ("activations, bf16", "step", "python", 61),
    ],
)
def test_an_operation_that_fails_costs_a_step_at_most(
    setting: str, what: str, site: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gc.collect()
    gc.freeze()
    try:
        results = dict(RUNS[what](SETTINGS[setting], SITES[site], 0, every))
    finally:
        gc.unfreeze()
    assert {at: str(result) for at, result in results.items() if isinstance(result, Broken)} == {}
    outcomes = [result for result in results.values() if isinstance(result, Outcome)]
    assert any(outcome.is_injected for outcome in outcomes)
    untyped = [told.trace for outcome in outcomes for told in outcome.errors if told.is_untyped]
    assert site in ("python", "interpreter") or untyped == []
