"""A training step whose saved tensors do not fit under RLIMIT_DATA: prints the loss, or the error's kind."""

import os
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import OutOfMemory
from gemini.nn.optimizer import HybridAdam

LAYERS, ROWS, WIDTH = 64, 2048, 1024
CAP_BYTES = 256 << 20
"""Beyond what the process has when training begins. The layers save 512 MiB."""


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.linspace(0.5, 1.5, WIDTH)) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = (x + scale).sin()
        return x


def main(policy: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Waves()
    plugin = GeminiPlugin(
        precision="fp32", host_memory="16MiB", offload_dir=folder, activation_policy=policy, telemetry=False
    )
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    x = torch.randn(ROWS, WIDTH)
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    limit = int(data.split()[1]) * 1024 + CAP_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        for _ in range(2):
            loss = model(x).square().sum()
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    except OutOfMemory as error:
        print(type(error).__name__, flush=True)
    else:
        print(loss.item(), flush=True)
    os._exit(0)  # at the limit there may be no memory for the end of an interpreter


if __name__ == "__main__":
    main(*sys.argv[1:])
