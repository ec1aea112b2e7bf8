"""Run by test_gradient_tensors.py: trains under RLIMIT_DATA with too little for activations and gradients at once.

python child_gradient_memory.py BYTES_FROM_WHICH_ON_GRADIENTS_ARE_NOT_COPIED
"""

import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import gradient_tensors
from gemini.nn.optimizer import HybridAdam

WIDTH, DEPTH, ROWS = 512, 96, 256
PARAMETERS = DEPTH * WIDTH * WIDTH
ACTIVATIONS = 2 * DEPTH * ROWS * WIDTH * 4
"""Two tensors a layer."""
SLACK = 64 << 20
"""Stacks of threads are most of it."""


def train(width: int, depth: int, rows: int) -> float:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.GELU())))
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-3)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, host_memory="8GiB"))
    model, optimizer, *_ = booster.boost(model, optimizer)
    loss = model(torch.randn(rows, width)).square().mean()
    booster.backward(loss, optimizer)
    optimizer.step()
    return loss.item()


def data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) << 10


def main() -> None:
    gradient_tensors.LARGE_NBYTES = int(sys.argv[1])
    torch.set_num_threads(1)
    train(WIDTH, 1, ROWS)  # libraries, kernels and threads
    assert SLACK < 4 * PARAMETERS, "there is room for all gradients beside the activations"
    limit = data_bytes() + 12 * PARAMETERS + ACTIVATIONS + SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    print(train(WIDTH, DEPTH, ROWS))


if __name__ == "__main__":
    main()
