"""Run by test_update_in_backward_memory.py: trains under RLIMIT_DATA, set to so many bytes a parameter above what a
warm process has.

    python child_gradient_peak.py BYTES_A_PARAMETER UPDATE_IN_BACKWARD
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    plugin |= {"precision": "fp32", "telemetry": False, "chunk_config_dict": {1: {"chunk_size": width * width}}}
    booster = Booster(plugin=GeminiPlugin(**plugin))
    model, optimizer, *_ = booster.boost(model, optimizer)
    losses = []
    for step in range(3):
        x = torch.randn(2, width, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x).square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(p.numel() for p in model.parameters()), losses


def main() -> None:
    update_in_backward = bool(int(sys.argv[2]))
    width, depth = 1024, 24
    train(64, 2, update_in_backward=update_in_backward)  # libraries, kernels and threads
    status = Path("/proc/self/status").read_text().splitlines()
    data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    limit = data + int(float(sys.argv[1]) * width * width * depth) + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    numel, losses = train(width, depth, host_memory="8GiB", update_in_backward=update_in_backward)
    print(json.dumps({"numel": numel, "losses": losses}))


if __name__ == "__main__":
    main()
