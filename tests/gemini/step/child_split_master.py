"""Run by test_split_master.py: trains under RLIMIT_DATA, set to so many bytes a parameter above what a warm process
has, as if there were no limit.

    python child_split_master.py BYTES_A_PARAMETER SPLIT_MASTER
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam

SLACK_BYTES = 48 << 20


def train(width: int, depth: int, **plugin: Any) -> tuple[int, list[float]]:
    torch.manual_seed(0)
    with LazyInitContext():
        model: Any = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.Tanh())))
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-3)
    plugin |= {"precision": "bf16", "telemetry": False, "chunk_config_dict": {1: {"chunk_size": width * width}}}
    booster = Booster(plugin=GeminiPlugin(**plugin))
    model, optimizer, *_ = booster.boost(model, optimizer)
    losses = []
    for step in range(3):
        x = torch.randn(2, width, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x).float().square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return boosted(model).manager.moves.evict_count, losses


def main() -> None:
    bytes_a_parameter, split_master = float(sys.argv[1]), bool(int(sys.argv[2]))
    width, depth = 1024, 48
    train(64, 2, split_master=split_master)  # libraries, kernels and threads
    status = Path("/proc/self/status").read_text().splitlines()
    data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    limit = data + int(bytes_a_parameter * width * width * depth) + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    evictions, losses = train(width, depth, host_memory="4GiB", split_master=split_master)
    print(json.dumps({"evictions": evictions, "losses": losses}))


if __name__ == "__main__":
    main()
