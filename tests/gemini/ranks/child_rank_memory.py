"""One rank of test_rank_memory.py: boosts a lazy model, trains a step, and says what that took, as one JSON line."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam

WIDTH = 1024
LAYERS = 64


def build(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def boosted(width: int, layers: int) -> tuple[Booster, Any, Any]:
    torch.manual_seed(0)
    with LazyInitContext():
        model = build(width, layers)
    booster = Booster(plugin=GeminiPlugin(telemetry=False))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-3))
    return booster, model, optimizer


def trained(booster: Booster, model: Any, optimizer: Any, width: int) -> float:
    loss = model(torch.ones(2, width, dtype=torch.bfloat16)).float().square().mean()
    booster.backward(loss, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) << 10


def main() -> None:
    gemini.launch_from_torch({})
    trained(*boosted(16, 2), 16)  # libraries, kernels and threads
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    booster, model, optimizer = boosted(WIDTH, LAYERS)
    peak = resident("VmHWM") - before
    stats = model.memory_stats()
    loss = trained(booster, model, optimizer, WIDTH)
    print(json.dumps({"boost_peak_bytes": peak, "model_data_bytes": stats["model_data/total_bytes"], "loss": loss}))


if __name__ == "__main__":
    main()
