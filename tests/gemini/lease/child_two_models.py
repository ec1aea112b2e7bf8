"""Run by tests: two models, boosted one after the other with nothing but ``offload_dir``, under RLIMIT_DATA.

    python child_two_models.py FOLDER [MIB of room]

Prints the losses of both, and what each has on disk at the end.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.nn.optimizer import HybridAdam

WIDTH = 1024


def make(layers: int, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())])
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-3)
    model, optimizer, *_ = Booster(plugin=GeminiPlugin(offload_dir="disk", telemetry=False)).boost(model, optimizer)
    return model, optimizer


def step(pair: tuple[Any, Any], number: int) -> float:
    model, optimizer = pair
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(number))
    loss = (model(x) - x).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


def main() -> None:
    os.chdir(sys.argv[1])
    step(make(1, 0), 0)  # libraries, kernels and threads
    if len(sys.argv) > 2:
        status = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
        limit = data + (int(sys.argv[2]) << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    first = make(16, 1)
    losses = [step(first, 0)]
    second = make(16, 2)
    for number in range(1, 4):
        losses += [step(first, number), step(second, number)]
    on_disk = [boosted(model).manager.ledger.used(Tier.DISK) for model, _ in (first, second)]
    print(json.dumps({"losses": losses, "on_disk": on_disk}))


if __name__ == "__main__":
    main()
