"""Ctrl-C before any line of ours, and signals at any time: training goes on as if it had not been interrupted.

`python scripts/faults interrupts` does the same thousands of times.
"""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupting import (
    PHASES,
    AfterSeconds,
    AtLine,
    Interrupt,
    Interrupted,
    Twice,
    lines_of,
    outcome_of,
    random_delays,
)
from loop import PLACEMENTS, Trained, batch, build

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam
from gemini.torch_private import saving_is_taken

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("one_thread"),
    # An interrupt may come out of the standard library's own iterators, which are not closed then.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LINES = 12


@pytest.fixture(autouse=True)
def ctrl_c_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def spread(places: Any, count: int) -> list[AtLine]:
    moments = [(place, nth) for place, times in places for nth in sorted({1, times})]
    return [AtLine(*moment) for moment in moments[:: max(1, len(moments) // count)]]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_training_that_is_interrupted_goes_on(placement: str, phase: str, tmp_path: Path) -> None:
    run = Interrupted(placement, tmp_path)
    outcomes: Counter[str] = Counter()
    for interrupt in spread(lines_of(run, phase), LINES):
        outcomes[outcome_of(run, phase, interrupt)] += 1
    for number, interrupt in enumerate(spread(lines_of(run, phase), LINES // 2)):
        outcomes[outcome_of(run, phase, Twice(*interrupt.moment, lines_between=1 + 7 * number))] += 1
    outcome_of(run, phase, Interrupt())
    delays = random_delays(0, 1.1 * run.seconds[phase])
    for _ in range(LINES):
        outcomes[outcome_of(run, phase, AfterSeconds(next(delays)))] += 1
    assert not [outcome for outcome in outcomes if "wrong" in outcome], outcomes
    assert outcomes["interrupted"] + outcomes["interrupted, not taken"] >= LINES / 2


@pytest.mark.parametrize("policy", ["keep", "offload", "recompute"])
def test_no_call_is_under_way_after_an_interrupt_where_it_ends(policy: str, tmp_path: Path) -> None:
    """A call that seemed to be under way for ever had all later forwards pass for parts of it."""
    run = Interrupted("disk", tmp_path, activation_policy=policy)
    codes = {"call", "_call", "_run", "of_call", "_end_call", "watched"}
    lines = [(place, times) for place, times in lines_of(run, PHASES[0]) if place[0].co_name in codes]
    interrupts = [AtLine(place, nth) for place, times in lines for nth in sorted({1, times})]
    outcomes = {str(interrupt): outcome_of(run, PHASES[0], interrupt) for interrupt in interrupts}
    assert len(outcomes) > 20
    assert not [outcome for outcome in outcomes.items() if "wrong" in outcome[1]]
    assert not saving_is_taken()


@pytest.mark.parametrize("phase", PHASES[:2])
def test_a_torn_step_can_be_reloaded(phase: str, tmp_path: Path) -> None:
    run = Interrupted("streamed", tmp_path, update_in_backward=True)
    outcomes: Counter[str] = Counter()
    for interrupt in spread(lines_of(run, phase), LINES):
        outcome = outcome_of(run, phase, interrupt)
        outcomes[outcome] += 1
        if "torn" in outcome:
            run = Interrupted("streamed", tmp_path, update_in_backward=True)
    assert not [outcome for outcome in outcomes if "wrong" in outcome], outcomes
    assert outcomes["torn, reloaded"] or phase == "step", outcomes


@pytest.mark.parametrize("is_lazy", [False, True], ids=["eager", "lazy"])
def test_a_boost_that_is_interrupted_is_done_or_not_begun(is_lazy: bool) -> None:
    def begin() -> tuple[Any, HybridAdam]:
        if is_lazy:
            with LazyInitContext():
                model = build()
        else:
            model = build()
        return model, HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)

    def boost(model: Any, optimizer: HybridAdam) -> Booster:
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **PLACEMENTS["disk"]))
        booster.boost(model, optimizer)
        return booster

    plain = Trained(None)
    torch.manual_seed(3)
    expected = plain.step(0)
    counting, (model, optimizer) = AtLine(), begin()
    with counting.armed():
        boost(model, optimizer)
    for interrupt in spread(counting.counts.items(), LINES):
        model, optimizer = begin()
        try:
            with interrupt.armed():
                booster = boost(model, optimizer)
        except KeyboardInterrupt:
            if not hasattr(model, "_gemini"):
                booster = boost(model, optimizer)
        torch.manual_seed(3)
        loss = model(batch(0)).square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        assert loss.item() == expected
