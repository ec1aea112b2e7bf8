"""Run by test_out_of_memory.py: a batch that does not fit under RLIMIT_DATA, then batches that do."""

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import is_out_of_memory
from gemini.nn.optimizer import HybridAdam

WIDTH = 128
HEADROOM_BYTES = 96 << 20
LARGE_ROWS = 40_000
"""Activations of 20 MiB a layer: eight layers are too many, a forward alone without gradients is not."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(8)])
        self.inflate_backward = False

    def forward(self, x: Tensor, copies: int = 1) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            kept = [x.clone() for _ in range(copies - 1)]
            x = sum(kept, x) / copies if kept else x
        if self.inflate_backward:
            x.register_hook(_inflate)
        return x


def _inflate(gradient: Tensor) -> Tensor:
    return torch.ones(HEADROOM_BYTES // 2).sum() * gradient  # twice what is there


def batch(step: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))


def train(where: str | None) -> tuple[str, list[Any]]:
    """With ``where``, managed, and the large batch after the second step."""
    torch.manual_seed(0)
    model: Any = Model()
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-2)
    booster = None
    if where is not None:
        plugin = GeminiPlugin(
            precision="fp32",
            telemetry=False,
            device_memory="300KiB",
            host_memory="8MiB",
            chunk_config_dict={1: {"chunk_size": WIDTH * WIDTH}},
        )
        booster = Booster(plugin=plugin)
        model, optimizer, *_ = booster.boost(model, optimizer)

    def step(number: int) -> float:
        loss = model(batch(number)).square().mean()
        booster.backward(loss, optimizer) if booster is not None else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    losses = [step(0), step(1)]
    failed_with = ""
    if where is not None:
        _limit()
        try:
            _run_out(model, booster, optimizer, where)
        except (RuntimeError, MemoryError) as error:
            assert is_out_of_memory(error), error
            failed_with = type(error).__name__
        model.inflate_backward = False
        gc.collect()
    losses += [step(2), step(3), step(4)]
    weights = [p.detach().double().sum().item() for p in _values(model, booster)]
    if where is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return failed_with, [losses, weights]


def _run_out(model: Any, booster: Any, optimizer: Any, where: str) -> None:
    if where == "evaluation":
        with torch.no_grad():
            model(batch(9, LARGE_ROWS), copies=8)
        return
    if where == "forward":
        model(batch(9, LARGE_ROWS))
        return
    model.inflate_backward = True
    loss = model(batch(9)).square().mean()
    booster.backward(loss, optimizer) if where == "booster.backward" else loss.backward()


def _values(model: Any, booster: Any) -> list[Tensor]:
    if booster is None:
        return list(model.parameters())
    return list(model.state_dict().values())


def _limit() -> None:
    gc.collect()
    data = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData")).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + HEADROOM_BYTES, resource.RLIM_INFINITY))


def main() -> None:
    torch.set_num_threads(1)
    train("forward")  # libraries, kernels and threads are there before the limit is
    said = {where: train(where) for where in sys.argv[1:]}
    print(json.dumps({"plain": train(None), **said}))


if __name__ == "__main__":
    main()
