"""The options of a boosted model: defaults work, nonsense is refused by name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gemini.chunk import MemoryMap, Tier
from gemini.config import PRECISIONS, GeminiConfig
from gemini.memory.capacity import find_capacities
from gemini.planning.placement import AutoPlacementPolicy


def test_the_defaults_are_valid_and_frozen() -> None:
    config = GeminiConfig()
    assert config.compute_dtype is torch.bfloat16 and config.policy == AutoPlacementPolicy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.precision = "fp32"  # type: ignore[misc]


@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS.items())
def test_a_precision_is_a_dtype(precision: str, dtype: torch.dtype) -> None:
    assert GeminiConfig(precision=precision).compute_dtype is dtype


def test_options_that_cannot_go_together_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="set offload_dir to a folder as well"):
        GeminiConfig(disk_memory=10)


@pytest.mark.parametrize(
    "options",
    [
        {"max_prefetch": 0},
        {"max_norm": 0.0},
        {"search_range": (10, 10), "search_step": 1},
        {"steady_device_ratio": 1.0, "warmup_non_model_ratio": 0.0},
        {"disk_memory": 1, "offload_dir": Path("x")},
    ],
)
def test_the_edges_are_allowed(options: dict[str, Any]) -> None:
    GeminiConfig(**options)


# -- capacities


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="DEVICE is the CUDA device here")


@no_cuda
def test_without_an_accelerator_device_and_host_are_one() -> None:
    capacities = find_capacities(GeminiConfig(host_memory=1000))
    assert capacities.memory is MemoryMap.UNIFIED and capacities.device.type == "cpu"
    assert capacities.nbytes == {Tier.DEVICE: 1000, Tier.HOST: 1000, Tier.DISK: 0}
    assert capacities.budgets[Tier.DEVICE].source == "the same RAM as host: argument host_memory"


@no_cuda
def test_device_memory_emulates_a_device_of_its_own() -> None:
    capacities = find_capacities(GeminiConfig(device_memory=10, host_memory=1000))
    assert capacities.memory is MemoryMap.EMULATED and capacities.nbytes[Tier.DEVICE] == 10
    assert capacities.budgets[Tier.DEVICE].source == "argument device_memory"


def test_what_is_not_said_is_found_out(tmp_path: Path) -> None:
    capacities = find_capacities(GeminiConfig(offload_dir=tmp_path / "not" / "yet"))
    assert all(nbytes > 0 for nbytes in capacities.nbytes.values())
    assert not (tmp_path / "not").exists()
    said = find_capacities(GeminiConfig(offload_dir=tmp_path, disk_memory=77))
    assert said.nbytes[Tier.DISK] == 77 and said.budgets[Tier.DISK].source == "argument disk_memory"
    assert find_capacities(GeminiConfig()).budgets[Tier.DISK].source == "no offload_dir"
