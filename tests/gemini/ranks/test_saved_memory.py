"""No rank holds the model while it is saved or loaded: that works under a limit in which the model has no room."""

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from world import Worlds

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import is_out_of_memory
from gemini.nn.optimizer import HybridAdam

WIDTH, LAYERS = 1024, 24
MEBI = 1 << 20
TENSOR_MIB = WIDTH * WIDTH * 4 // MEBI
SLACK_MIB = 8 * TENSOR_MIB
"""Beside what a rank holds: a third of the masters."""

pytestmark = pytest.mark.heavy


def held_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmData:")[1].split()[0]) << 10


@contextmanager
def limited(mib: int) -> Iterator[None]:
    """As much memory more as this."""
    ctypes.CDLL(None).malloc_trim(0)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held_bytes() + mib * MEBI, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def boosted(width: int, layers: int) -> tuple[Booster, Any, Any]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    booster = Booster(plugin=GeminiPlugin(telemetry=False, chunk_config_dict={1: {"chunk_size": 4 * MEBI}}))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    booster.backward(model(torch.ones(2, width)).float().mean(), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    model._gemini.manager.settle()
    return booster, model, optimizer


def save_and_load(folder: str, layout: str) -> list[str]:
    """Returns what failed under the limit, and what did not."""
    booster, model, optimizer = boosted(32, 2)
    booster.save(f"{folder}/small", model=model, optimizer=optimizer, layout=layout)  # what is allocated once
    booster.load(f"{folder}/small", model=model, optimizer=optimizer)
    booster, model, optimizer = boosted(WIDTH, LAYERS)
    done = []
    with limited(SLACK_MIB):
        booster.save(folder, model=model, optimizer=optimizer, layout=layout)
        done.append("saved")
        booster.load(folder, model=model, optimizer=optimizer)
        done.append("loaded")
    dist.barrier()
    with limited(SLACK_MIB):
        try:
            model.state_dict()
        except (RuntimeError, MemoryError) as error:
            done += ["no room for a state dict"] if is_out_of_memory(error) else []
    return done


@pytest.mark.parametrize("layout", ["hf", "dcp"])
def test_no_rank_holds_the_model_while_it_is_saved_or_loaded(layout: str, worlds: Worlds, tmp_path: Path) -> None:
    for done in worlds(2).run(save_and_load, str(tmp_path), layout):
        assert done == ["saved", "loaded", "no room for a state dict"]
