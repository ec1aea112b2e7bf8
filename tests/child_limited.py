"""Run by tests (see `limited.py`): trains under RLIMIT_DATA, set to BYTES_A_PARAMETER above what a warm process
has, as if there were no limit.

    python child_limited.py BYTES_A_PARAMETER LAYERS '{"precision": "bf16", ...}'
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

WIDTH = 1024
SLACK_BYTES = 48 << 20


def train(width: int, depth: int, **plugin: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    with LazyInitContext():
        model: Any = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.Tanh())))
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-3)
    plugin |= {"telemetry": False, "chunk_config_dict": {1: {"chunk_size": width * width}}}
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
    return {"losses": losses, "evictions": boosted(model).manager.moves.evict_count}


def main() -> None:
    bytes_a_parameter, depth, plugin = float(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    train(64, 2, **plugin)  # libraries, kernels and threads
    status = Path("/proc/self/status").read_text().splitlines()
    data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    limit = data + int(bytes_a_parameter * WIDTH * WIDTH * depth) + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(json.dumps(train(WIDTH, depth, host_memory="8GiB", **plugin)))


if __name__ == "__main__":
    main()
