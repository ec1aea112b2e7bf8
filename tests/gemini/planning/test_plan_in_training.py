"""Training follows its plan: once settled every fetch was prefetched, and there are no more than there must be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from belady import belady
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

WIDTH, DEPTH = 32, 16
COPY = WIDTH * (WIDTH + 1) * 2
STEPS, SETTLED = 7, 3


class Residual(nn.Module):
    """A block of two layers, checkpointed or not."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.block, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.block(x)

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def plain() -> nn.Module:
    return nn.Sequential(*(Residual(False) for _ in range(DEPTH // 2)))


def checkpointed() -> nn.Module:
    return nn.Sequential(*(Residual(True) for _ in range(DEPTH // 2)))


def tied() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    model[-1].weight = model[0].weight
    return model


def options(capacity: int, tier: str, folder: Path) -> dict[str, Any]:
    if tier == "host":
        device = {"device_memory": capacity * COPY, "placement_policy": "static", "offload_optim_frac": 1.0}
        return {**device, "host_memory": DEPTH * COPY * 8}
    return {"device_memory": capacity * COPY, "host_memory": "1MiB", "offload_dir": folder}


@pytest.mark.parametrize(
    ("build", "capacity", "tier"),
    [(plain, 5, "host"), (plain, 12, "host"), (checkpointed, 5, "host"), (tied, 8, "host"), (checkpointed, 8, "disk")],
)
def test_steps_fetch_what_belady_would_and_wait_for_no_miss(
    build: Callable[[], nn.Module], capacity: int, tier: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    plugin = GeminiPlugin(
        telemetry=False,
        chunk_config_dict={1: {"chunk_size": WIDTH * (WIDTH + 1)}},
        **options(capacity, tier, tmp_path),
    )
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    counts = []
    for _ in range(STEPS):
        loss = model(torch.randn(4, WIDTH)).float().square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        stats = model.memory_stats()
        counts.append((stats["move/fetch_count"], stats["need/miss_count"]))
    engine = boosted(model).engine
    chunks = {chunk.index for chunk in engine.manager.chunks if not chunk.full_is_home}
    planner = engine.pacing.cycle.expected(with_gradients=True)
    assert planner is not None
    cycle = [moment.in_use & chunks for moment in planner.trace.moments]
    room = engine.room.full_capacity_bytes // COPY
    optimum = belady(cycle, room, STEPS)[SETTLED:]
    assert sum(optimum) > 0, "it streams"
    fetched, missed = (last - first for last, first in zip(counts[-1], counts[SETTLED - 1], strict=True))
    assert fetched <= 1.02 * sum(optimum)
    assert missed == 0
