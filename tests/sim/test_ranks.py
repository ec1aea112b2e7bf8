"""Ranks on one host, each with a simulated device of its own: the numbers of one process with its device, bit for bit.

The device is global to its process, and so is its memory; ranks reach each other through RAM, as they do from GPUs.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # ranks import this file alone

from device_build import Unavailable, library
from rank_training import TIERS, Training, Where, check_exact
from torch import Tensor, nn
from world import World


class OnDevice(Training):
    """Trains on the device of its process, with and without management."""

    seed = 0

    def built(self) -> nn.Module:
        if not hasattr(torch, "sim"):
            from simulated import register

            OnDevice.device = register()
        OnDevice.device.seed(self.seed)  # type: ignore[attr-defined]
        model = super().built()
        return model if self.is_managed else model.to("sim")

    def batch(self, number: int) -> Tensor:
        return super().batch(number).to("sim")  # type: ignore[no-any-return]

    def end(self) -> Any:
        ended = super().end()
        ended.weights = {name: value.cpu() for name, value in ended.weights.items()}
        ended.states = {n: {k: torch.as_tensor(v).cpu() for k, v in s.items()} for n, s in ended.states.items()}
        return ended


class Half(OnDevice):
    precision = "bf16"
    seed = 1


pytestmark = [pytest.mark.heavy, pytest.mark.timeout(180)]  # ranks are started for it


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    try:
        library()
    except Unavailable as error:
        pytest.skip(str(error))
    with World(2) as world:
        yield world


@pytest.mark.parametrize("place", ["resident", "streamed", "disk"])
def test_two_ranks_with_a_device_each_are_one_process(pair: World, place: str) -> None:
    check_exact(pair, OnDevice, Where.ALONE, **TIERS[place])
    check_exact(pair, Half, Where.ALONE, **TIERS[place])


def test_two_ranks_with_a_device_each_are_plain_torch_on_a_device(pair: World) -> None:
    check_exact(pair, OnDevice, Where.PLAIN, **TIERS["resident"])
