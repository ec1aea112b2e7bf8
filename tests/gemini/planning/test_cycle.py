"""A run that takes turns between kinds of cycles is prefetched as one that always does the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop import SMALL, WIDTH, batch
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.usefixtures("one_thread")

PATTERNS: dict[str, Callable[[int], bool]] = {
    "always the same": lambda n: True,
    "taking turns": lambda n: n % 2 == 0,
    "in pairs": lambda n: n // 2 % 2 == 0,
}


class TwoPaths(nn.Module):
    def __init__(self, takes_first: Callable[[int], bool]) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(6)]) for _ in range(2))
        self.takes_first, self.calls = takes_first, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.first if self.takes_first(self.calls) else self.second:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_cycles_that_take_turns_have_no_fetch_on_demand_once_each_is_known(pattern: Callable[[int], bool]) -> None:
    model: Any = TwoPaths(pattern)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, device_memory="64KiB", **SMALL))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))

    def steps(count: int) -> None:
        for step in range(count):
            booster.backward(model(batch(step)).square().mean(), optimizer)
            optimizer.step()
            optimizer.zero_grad()

    steps(12)
    moves = boosted(model).manager.moves
    demanded, fetched = moves.miss_count, moves.fetch_count
    steps(12)
    assert moves.fetch_count > fetched
    assert moves.miss_count == demanded


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_plans_tell_what_one_moment_needs_as_all_moments_seen_do(pattern: Callable[[int], bool]) -> None:
    model: Any = TwoPaths(pattern)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, device_memory="64KiB", **SMALL))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    pacing = boosted(model).engine.pacing
    assert pacing.seen_bytes() == 0
    for step in range(6):
        booster.backward(model(batch(step)).square().mean(), optimizer)
        assert 0 < pacing.seen_bytes() == pacing.least_bytes({})
        optimizer.step()
        optimizer.zero_grad()
        assert pacing.seen_bytes() == pacing.least_bytes({})
