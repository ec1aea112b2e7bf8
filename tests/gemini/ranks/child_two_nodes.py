"""A rank of `test_two_nodes.py`, or all of them in one: trains, and the first one saves what it has."""

import sys

import torch
import torch.distributed as dist
from torch import nn

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

MICRO_BATCHES = 4


def main(path: str) -> None:
    gemini.launch_from_torch({}, timeout=60)
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = HybridAdam(model.parameters(), lr=1e-2)
    plugin = GeminiPlugin(telemetry=False, max_norm=1.0, hybrid_shard_size=2 if count > 1 else None)
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, optimizer)
    for step in range(4):
        for number in range(rank, MICRO_BATCHES, count):
            generator = torch.Generator().manual_seed(step * MICRO_BATCHES + number)
            loss = model(torch.randn(8, 64, generator=generator)).float().square().mean()
            booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        torch.save(dict(gemini.named_tensors(model)), path)


if __name__ == "__main__":
    main(sys.argv[1])
