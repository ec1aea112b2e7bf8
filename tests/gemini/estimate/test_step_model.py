"""The time of a step by a packing: what it computes and moves, and in which order."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gemini.chunk import MemoryMap, Tier
from gemini.config import GeminiConfig
from gemini.estimate.demand import ModelData, room_for_copies
from gemini.estimate.step_model import Training, disk_rates, early_updates, step_seconds, uses
from gemini.estimate.subject import Subject

TRAINING = Training(tokens=10, checkpointing=False, state_bytes=12.0, in_backward=False, ahead=True, prefetched=2)
SPEED = {
    "flops_per_second": 2e7, "training_flops_per_second": 1e7, "adam_elements_per_second": 1e6,
    "host_to_device": 1e12, "disk_to_host": 1e6, "host_to_disk": 2e6, "disk_mixed": 1.5e6,
}  # fmt: skip


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 512, bias=False)
        self.head.weight = self.embedding.weight


def chain() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))


def answer(
    build: Callable[[], nn.Module], host: float, disk: int = 1 << 30, training: Training = TRAINING, **speed: Any
) -> dict[str, float]:
    """With ``host`` bytes of RAM a parameter."""
    data = ModelData(Subject("test", build, lambda size, length: {}), GeminiConfig(chunk_numel=4352))
    limits = {Tier.DEVICE: 1, Tier.HOST: round(host * data.numel), Tier.DISK: disk}
    packing = data.pack(limits, MemoryMap.UNIFIED)
    return step_seconds(data.model, packing, room_for_copies(packing, limits), training, {**SPEED, **speed})


def test_where_all_fits_a_step_is_computing_and_the_optimizer() -> None:
    found = answer(chain, 20.0, disk=0)
    numel = sum(p.numel() for p in chain().parameters())
    assert found["computing"] == pytest.approx(6 * numel * 10 / 1e7)
    assert found["step"] == pytest.approx(found["computing"] + found["optimizer"])
    assert "disk" not in found and "waiting" not in found


def test_recomputing_takes_another_forward() -> None:
    again = replace(TRAINING, checkpointing=True)
    assert answer(chain, 20.0, training=again)["computing"] == pytest.approx(answer(chain, 20.0)["computing"] * 8 / 6)


def test_what_is_on_the_disk_takes_longer_than_its_traffic_because_it_begins_late() -> None:
    found = answer(chain, 12.0)
    assert found["disk"] > found["computing"] and found["waiting"] > 0
    assert (
        max(found["disk"], found["computing"])
        < found["step"]
        <= sum(found[n] for n in ("disk", "computing", "optimizer"))
    )
    earlier = answer(chain, 12.0, training=replace(TRAINING, in_backward=True))
    assert earlier["step"] < found["step"]


def test_updates_of_what_is_all_on_disk_begin_ahead_of_the_step() -> None:
    data = ModelData(Subject("test", chain, lambda size, length: {}), GeminiConfig(chunk_numel=4352))
    limits = {Tier.DEVICE: 1, Tier.HOST: 12 * data.numel, Tier.DISK: 1 << 30}
    packing = data.pack(limits, MemoryMap.UNIFIED)
    on_disk = {plan.layout.index for plan in packing.plans if plan.nbytes_on(Tier.HOST) == 0}
    assert on_disk and early_updates(packing, TRAINING) == on_disk
    assert early_updates(packing, replace(TRAINING, ahead=False)) == frozenset()


def test_without_a_measured_disk_there_is_no_time_of_a_step_that_needs_it() -> None:
    assert "step" not in answer(chain, 12.0, disk_to_host=0.0)
    assert "step" in answer(chain, 20.0, disk_to_host=0.0)
    assert "step" not in answer(chain, 20.0, flops_per_second=0.0, training_flops_per_second=0.0)


def test_files_without_a_mixed_rate_have_one_between() -> None:
    rates = disk_rates({"disk_to_host": 1.0, "host_to_disk": 3.0})
    assert rates is not None and rates.mixed == 1.5
    assert disk_rates({"host_to_disk": 3.0}) is None


def test_a_tied_head_is_used_at_both_places_and_computes_at_one() -> None:
    data = ModelData(Subject("test", Tied, lambda size, length: {}), GeminiConfig(chunk_numel=8192))
    packing = data.pack(dict.fromkeys(Tier, 1 << 30), MemoryMap.UNIFIED)
    first, inner, last = uses(data.model, packing)
    assert first.chunks == last.chunks and (first.numel, inner.numel, last.numel) == (0, 16 * 17, 512 * 16)


def test_what_an_accelerator_computes_does_not_take_the_cpu_that_updates() -> None:
    data = ModelData(Subject("test", chain, lambda size, length: {}), GeminiConfig(chunk_numel=4352))
    limits = {Tier.DEVICE: 4 * data.numel, Tier.HOST: 20 * data.numel, Tier.DISK: 0}
    packing = data.pack(limits, MemoryMap.ACCELERATOR)
    speed = {**SPEED, "disk_to_host": 0.0}
    found = step_seconds(data.model, packing, room_for_copies(packing, limits), TRAINING, speed)
    assert set(found) >= {"computing", "optimizer", "step"}
    assert torch.get_default_dtype() is torch.float32
