"""Run by tests: trains in RAM that is shared with other processes, as under one control group.

    python child_shares.py '{"folder": ..., "total": bytes, "layers": 4, "steps": 6, "waits_after": [2]}'

The limit is a double of a group's: what is free of it is ``total`` less the RAM that all processes that are named in
the folder have really taken since they began. ``RLIMIT_DATA`` holds each to it besides. The child says what it does, a
line for each step, and waits for a line on stdin after some of them.
"""

import gc
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
from gemini.boosting import seating
from gemini.chunk import Tier
from gemini.lease import part
from gemini.lease.limits import Limit, private_ram
from gemini.memory import tracker
from gemini.nn.optimizer import HybridAdam

WIDTH = 1024


class Group:
    """A limit that processes share."""

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total

    def enter(self) -> None:
        """What this process takes from now on counts."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / str(os.getpid())).write_text(str(private_ram()))

    def limits(self, *_: Any) -> list[Limit]:
        taken = 0
        for file in self.folder.iterdir():
            if (now := private_ram(int(file.name))) and (base := file.read_text()):
                taken += max(0, now - int(base))
        return [Limit("the group's headroom", max(0, self.total - taken), self.total, True, "the group")]


def train(asked: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    layers = [m for _ in range(asked["layers"]) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    model: Any = nn.Sequential(*layers)
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-3)
    plugin = GeminiPlugin(offload_dir=asked["folder"] + "/disk", chunk_config_dict={1: {"chunk_size": WIDTH * WIDTH}})
    model, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
    manager = boosted(model).manager
    losses, capacities, on_disk = [], [], []
    say("boosted", manager.ledger.capacity(Tier.HOST))
    for step in range(asked["steps"]):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        capacities.append(manager.ledger.capacity(Tier.HOST))
        on_disk.append(manager.ledger.used(Tier.DISK))
        say(step, capacities[-1], on_disk[-1])
        if step in asked["waits_after"]:
            sys.stdin.readline()
    weights = {name: p.detach().double().sum().item() for name, p in model.named_parameters()}
    return {"losses": losses, "capacities": capacities, "on_disk": on_disk, "weights": weights}


def say(*words: Any) -> None:
    print(*words, flush=True)


def main() -> None:
    asked = json.loads(sys.argv[1])
    train({**asked, "layers": 1, "steps": 1, "waits_after": []})  # libraries, kernels and threads
    gc.collect()
    group = Group(Path(asked["folder"]) / "group", asked["total"])
    group.enter()
    for module in (tracker, seating):
        module.ram_limits = group.limits  # type: ignore[attr-defined]
    part.LOOK_SECONDS = 0.0
    status = Path("/proc/self/status").read_text().splitlines()
    data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    limit = data + asked["total"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    say(json.dumps(train(asked)))


if __name__ == "__main__":
    main()
