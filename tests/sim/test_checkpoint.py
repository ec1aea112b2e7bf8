"""A run on a device with memory of its own goes on from its checkpoint, its random numbers included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from simulated import SimulatedDevice
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.own_process()


class Run:
    """A model that draws random numbers on the device."""

    def __init__(self, placement: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.2)) for _ in range(6)))
        self.booster = Booster(plugin=GeminiPlugin(precision="bf16", telemetry=False, **placement))
        optimizer = HybridAdam(model.parameters(), lr=1e-2)
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)

    def train(self, steps: int) -> dict[str, Tensor]:
        for _ in range(steps):
            x = torch.randn(4, 32).to(torch.accelerator.current_accelerator())
            self.booster.backward(self.model(x).float().square().mean(), self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.mark.parametrize("use_async", [True, pytest.param(False, marks=pytest.mark.heavy)])
def test_a_run_on_a_device_goes_on(
    device: SimulatedDevice, placement: dict[str, Any], tmp_path: Path, use_async: bool
) -> None:
    run = Run(placement, seed=0)
    run.train(3)
    run.booster.save(tmp_path / "saved", model=run.model, optimizer=run.optimizer, use_async=use_async)
    want = run.train(3)
    run.booster.wait_until_finished()
    other = Run(placement, seed=1)
    other.train(1)
    other.booster.load(tmp_path / "saved", model=other.model, optimizer=other.optimizer)
    found = other.train(3)
    assert all(torch.equal(found[name], value) for name, value in want.items())
