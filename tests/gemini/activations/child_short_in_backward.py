"""Steps under RLIMIT_DATA whose backward takes more than is foreseen: prints how each step ended, and the gradients."""

import hashlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import OutOfMemory
from gemini.memory.tracker import host_headroom
from gemini.nn.optimizer import HybridAdam

BLOCKS, ROWS, WIDTH = 8, 4096, 1024
CAP_BYTES = 760 << 20
"""Beyond what the process has when training begins: twice what the blocks save, 32 MiB each, and more."""
MORE_BYTES = 64 << 20
"""What backward asks for beyond all that is free when it comes for the first time."""


class Greedy(torch.autograd.Function):
    """Takes more memory in the first backward than there is, and as much in each later one."""

    asks_bytes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Greedy.asks_bytes = Greedy.asks_bytes or host_headroom()[0] + MORE_BYTES
        if resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY:
            torch.empty(Greedy.asks_bytes, dtype=torch.uint8).fill_(1)
        return gradient


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale.weight).sin().cos()


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wrapped() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return Greedy.apply(x)  # type: ignore[no-any-return]


def main(folder: str, is_limited: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = Model()
    plugin = GeminiPlugin(
        precision="fp32", host_memory="16MiB", offload_dir=folder, activation_policy="auto", telemetry=False
    )
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    x = torch.randn(ROWS, WIDTH)
    if is_limited == "limited":
        data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        limit = int(data.split()[1]) * 1024 + CAP_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for _ in range(5):
        try:
            booster.backward(model(x).square().sum(), optimizer)
        except OutOfMemory:
            print("OutOfMemory", flush=True)
            optimizer.zero_grad()
        else:
            break
    values = b"".join(p.grad.numpy().tobytes() for p in model.parameters())
    print(hashlib.sha256(values).hexdigest(), boosted(model).saving.counts.leave_count > 0, flush=True)
    os._exit(0)  # at the limit there may be no memory for the end of an interpreter


if __name__ == "__main__":
    main(*sys.argv[1:])
