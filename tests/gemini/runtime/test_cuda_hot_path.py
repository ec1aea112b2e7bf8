"""On a CUDA device: the same numbers, no synchronisation by hooks, no allocation in the steady state."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDTH, DEPTH, BATCH = 512, 12, 64
SYNCHRONISING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMalloc", "cudaFree")
PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": 6 * WIDTH * (WIDTH + 1) * 2},
    "streamed, without shadows": {
        "device_memory": 6 * WIDTH * (WIDTH + 1) * 2,
        "host_memory": (DEPTH + 1) * (WIDTH * WIDTH + WIDTH) * 14,
    },
}


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = (layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU()))
    return nn.Sequential(*layers).cuda()


def managed(**plugin: Any) -> tuple[Booster, nn.Module, Any]:
    sizes = {1: {"chunk_size": WIDTH * (WIDTH + 1)}}
    booster = Booster(plugin=GeminiPlugin(telemetry=False, chunk_config_dict=sizes, **plugin))
    plain = build()
    model, optimizer, *_ = booster.boost(plain, HybridAdam(plain.parameters(), lr=1e-3))
    return booster, model, optimizer


def train(booster: Booster, model: nn.Module, optimizer: Any, steps: int) -> list[Tensor]:
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(torch.randn(BATCH, WIDTH, device="cuda", dtype=torch.bfloat16)).float().square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@contextmanager
def synchronising_calls(counts: Counter[str]) -> Iterator[None]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        yield
    counts.update({event.key: event.count for event in profile.key_averages() if event.key in SYNCHRONISING})


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_forward_and_backward_add_no_synchronisation_and_no_allocation_by_the_system(
    placement: dict[str, Any],
) -> None:
    booster, model, optimizer = managed(**placement)
    train(booster, model, optimizer, 4)  # the warm-up step measures, and may synchronise
    x = torch.randn(BATCH, WIDTH, device="cuda", dtype=torch.bfloat16)
    counts, plain_counts = Counter[str](), Counter[str]()
    with synchronising_calls(counts):
        booster.backward(model(x).float().square().mean(), optimizer)
    plain = build().bfloat16()
    plain(x).float().square().mean().backward()
    with synchronising_calls(plain_counts):
        plain(x).float().square().mean().backward()
    assert counts - plain_counts == Counter()
    if placement:
        assert model.memory_stats()["move/fetch_count"] > 0


def test_the_profiler_notices_a_synchronisation() -> None:
    counts = Counter[str]()
    with synchronising_calls(counts):
        torch.ones(1, device="cuda").item()
    assert counts


def test_hooks_run_where_synchronising_is_an_error() -> None:
    booster, model, optimizer = managed(**PLACEMENTS["streamed"])
    train(booster, model, optimizer, 4)
    x = torch.randn(BATCH, WIDTH, device="cuda", dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        booster.backward(model(x).float().square().mean(), optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("placement", list(PLACEMENTS.values())[1:], ids=list(PLACEMENTS)[1:])
def test_streaming_gives_the_numbers_of_the_resident_model(placement: dict[str, Any]) -> None:
    # Compared with homes on HOST everywhere: the kernels of CPU and GPU need not round alike.
    offloaded = {"placement_policy": "static", "offload_optim_frac": 1.0}
    expected = train(*managed(**offloaded), steps=6)
    ours = train(*managed(**{**placement, **offloaded}), steps=6)
    assert [loss.item() for loss in ours] == [loss.item() for loss in expected]


@pytest.mark.parametrize("placement", [{}, {"device_memory": 6 * WIDTH * (WIDTH + 1) * 14}], ids=["all", "half"])
def test_split_masters_give_the_numbers_of_whole_ones(placement: dict[str, Any]) -> None:
    booster, model, optimizer = managed(**placement, split_master=True)
    split = [chunk.is_split for chunk in boosted(model).manager.chunks]
    assert any(split) and all(split) == (not placement)
    expected = train(*managed(**placement), steps=6)
    assert [loss.item() for loss in train(booster, model, optimizer, 6)] == [loss.item() for loss in expected]


def test_the_steady_state_asks_the_system_for_no_memory() -> None:
    booster, model, optimizer = managed(**PLACEMENTS["streamed"])
    train(booster, model, optimizer, 4)
    before = torch.cuda.memory_stats()["segment.all.allocated"]
    train(booster, model, optimizer, 6)
    assert torch.cuda.memory_stats()["segment.all.allocated"] == before
