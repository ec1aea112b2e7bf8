"""How much a save and a load take beside the model: ``child_memory.py FOLDER``. Prints MiB."""

import ctypes
import json
import sys
from pathlib import Path

import torch
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

MEBI = 1 << 20


def status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def growth(function, *args, **kwargs) -> float:
    """By how much the resident memory peaks above what it is now."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function(*args, **kwargs)
    return status("VmHWM") - before


def build(width: int, layers: int, folder: Path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    plugin = GeminiPlugin(
        precision="bf16",
        telemetry=False,
        host_memory="72MiB",
        offload_dir=folder,
        chunk_config_dict={1: {"chunk_size": 4 * MEBI}},
    )
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    booster.backward(model(torch.ones(2, width)).float().mean(), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    model._gemini.manager.settle()  # the update goes on behind the step, and touches memory
    return booster, model, optimizer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    booster, model, optimizer = build(64, 2, folder)  # whatever is allocated once
    for action in (booster.save_model, booster.load_model):
        action(model, folder / "small")
    for action in (booster.save_optimizer, booster.load_optimizer):
        action(optimizer, folder / "small")
    booster, model, optimizer = build(2048, 8, folder)  # 128 MiB of masters, 16 MiB each
    shards = {"shard": True, "size_per_shard": 40}
    print(
        json.dumps(
            {
                "save_model": growth(booster.save_model, model, folder / "whole"),
                "save_model sharded": growth(booster.save_model, model, folder / "shards", **shards),
                "load_model": growth(booster.load_model, model, folder / "whole"),
                "load_model sharded": growth(booster.load_model, model, folder / "shards"),
                "save_optimizer": growth(booster.save_optimizer, optimizer, folder / "whole"),
                "load_optimizer": growth(booster.load_optimizer, optimizer, folder / "whole"),
                "state_dict": growth(model.state_dict),
            }
        )
    )
