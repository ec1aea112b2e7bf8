"""What follows training on a device with streams of its own: a save in the background, and a running average."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sim_tasks import PLACEMENTS, Tiny, batches, in_folder, loss
from simulated import SimulatedDevice
from torch import Tensor

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.own_process()
DECAY = 0.9


def train(booster: Booster, model: Any, optimizer: Any, tokens: list[Tensor]) -> None:
    for each in tokens:
        booster.backward(loss(model, each), optimizer)
        optimizer.step()
        optimizer.zero_grad()


def tensors(folder: Path) -> dict[str, Tensor]:
    newest = max(folder.glob("checkpoint-*"))
    return {f"{p.name}/{name}": value for p in newest.glob("*.safetensors") for name, value in load_file(p).items()}


@pytest.mark.parametrize(("name", "limit"), [("device", 0), ("mixed", "1MiB"), ("disk", "1MiB")])
def test_saves_in_the_background_and_averages_have_the_values_of_their_step(
    device: SimulatedDevice, name: str, limit: Any, tmp_path: Path
) -> None:
    placement = in_folder(PLACEMENTS[name], tmp_path)
    booster = Booster(plugin=GeminiPlugin(telemetry=False, snapshot_memory=limit, **placement))
    torch.manual_seed(0)
    model = Tiny()
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
    average = gemini.EMA(model, DECAY)
    expected: dict[str, Tensor] = {}
    for seed, each in enumerate(batches(6)):
        device.seed(seed)
        train(booster, model, optimizer, [each])
        masters = dict(gemini.named_tensors(model))
        expected = {n: expected[n].lerp_(v, 1 - DECAY) if expected else v.clone() for n, v in masters.items()}
        if seed % 2:
            booster.save(tmp_path / "now", model=model, optimizer=optimizer, keep=1)
            booster.save(tmp_path / "later", model=model, optimizer=optimizer, keep=1, use_async=True)
        else:
            booster.wait_until_finished()
            if seed:
                now, later = tensors(tmp_path / "now"), tensors(tmp_path / "later")
                assert now.keys() == later.keys()
                assert [name for name in now if not torch.equal(now[name], later[name])] == []
    found = dict(average.named_tensors())
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    booster.wait_until_finished()
