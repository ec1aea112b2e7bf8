"""Run by test_until_short.py: a GPT with a long sequence, under RLIMIT_DATA, with offload_dir and at most a policy.

    python child_until_short.py MIB_BEYOND_WHAT_THERE_IS FOLDER [POLICY]

0 MiB: without a limit. Prints the losses and how often the policy has changed, or the kind of error.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import OutOfMemory
from gemini.nn.optimizer import HybridAdam

WIDTH, HEADS, LAYERS, LENGTH, VOCABULARY = 128, 4, 8, 1024, 300


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        down: Tensor = self.down(nn.functional.gelu(self.up(self.between(x))))
        return x + down


def gpt(layers: int) -> nn.Module:
    blocks = [Block() for _ in range(layers)]
    ends = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, *ends)


def train(layers: int, folder: str, policy: dict[str, str], limit_mib: int = 0) -> tuple[list[float], int | float]:
    torch.manual_seed(0)
    model: Any = gpt(layers)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", offload_dir=folder, telemetry=False, **policy))
    if limit_mib:
        status = Path("/proc/self/status").read_text().splitlines()
        there = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (there + (limit_mib << 20),) * 2)
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(3):
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.memory_stats()["activation/switch_count"]


def main() -> None:
    limit_mib, folder, policy = (
        int(sys.argv[1]),
        sys.argv[2],
        dict(zip(["activation_policy"], sys.argv[3:], strict=False)),
    )
    torch.set_num_threads(1)
    train(1, folder, policy)  # libraries, kernels and threads
    try:
        print(json.dumps(train(LAYERS, folder, policy, limit_mib)), flush=True)
    except OutOfMemory as error:
        print(json.dumps(type(error).__name__), flush=True)
    os._exit(0)  # at the limit there may be no memory for the end of an interpreter


if __name__ == "__main__":
    main()
