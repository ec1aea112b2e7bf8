"""What each tier may hold, where the number comes from, and that no byte is given away twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import masters
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MASTER, SHADOW, MemoryMap, Tier
from gemini.config import GeminiConfig
from gemini.memory import capacity
from gemini.memory.capacity import find_capacities
from gemini.memory.tracker import Budget
from gemini.nn.optimizer import HybridAdam

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="emulates a device on a box without one")
GIB = 1 << 30


@pytest.fixture(autouse=True)
def ram_of_ten_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "host_budget", lambda *_, **__: Budget(10 * GIB, "80% of a made-up limit"))


@without_cuda
def test_an_emulated_device_takes_its_bytes_from_the_ram_that_is_found() -> None:
    found = find_capacities(GeminiConfig(device_memory=4 * GIB))
    assert found.nbytes == {Tier.DEVICE: 4 * GIB, Tier.HOST: 6 * GIB, Tier.DISK: 0}
    assert found.budgets[Tier.HOST].source == "80% of a made-up limit, less 4.0 GiB for the emulated device"
    assert found.budgets[Tier.DEVICE].source == "argument device_memory"
    assert find_capacities(GeminiConfig(device_memory=40 * GIB)).nbytes[Tier.HOST] == 0


@without_cuda
def test_what_the_user_says_is_taken_as_it_is() -> None:
    found = find_capacities(GeminiConfig(device_memory=4 * GIB, host_memory=9 * GIB))
    assert found.nbytes[Tier.HOST] == 9 * GIB and found.budgets[Tier.HOST].source == "argument host_memory"


@without_cuda
def test_device_and_host_are_one_budget_where_nothing_is_emulated(tmp_path: Path) -> None:
    found = find_capacities(GeminiConfig(offload_dir=tmp_path / "to" / "be" / "made"))
    assert found.memory is MemoryMap.UNIFIED and found.nbytes[Tier.DEVICE] == found.nbytes[Tier.HOST] == 10 * GIB
    assert "free disk" in found.budgets[Tier.DISK].source


def trained(**plugin: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    booster = Booster(plugin=GeminiPlugin(telemetry=False, chunk_config_dict={1: {"chunk_size": 64 * 65}}, **plugin))
    boosted_model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    for _ in range(3):
        loss = boosted_model(torch.randn(4, 64)).float().square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    boosted(boosted_model).manager.settle()
    return boosted_model  # type: ignore[no-any-return]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_static_fraction_is_what_it_says_to_one_chunk_and_reported(fraction: float) -> None:
    model = trained(
        device_memory="1GiB", placement_policy="static", offload_optim_frac=fraction, offload_param_frac=fraction
    )
    stats = model.memory_stats()
    assert fraction <= stats["placement/offload_optim_frac"] < fraction + 1 / 8
    # Never less room than two full copies: the unit that runs and the one that comes next.
    assert abs(stats["placement/offload_param_frac"] - fraction) <= 1 / 8 or fraction > 0.8
    assert f"{stats['placement/offload_optim_frac']:.1%} of the homes" in model.memory_summary()


def test_each_capacity_is_reported_with_where_it_comes_from(tmp_path: Path) -> None:
    summary = trained(device_memory="1MiB", offload_dir=tmp_path, disk_memory="2MiB").memory_summary()
    assert "device capacity: argument device_memory" in summary
    assert "host capacity: 80% of a made-up limit, less 1.0 MiB for the emulated device" in summary
    assert "disk capacity: argument disk_memory" in summary


# -- shadows


def shadows(model: nn.Module) -> list[bool]:
    """For each chunk off the device, whether it has a shadow; those that there are are checked."""
    found = []
    for chunk in boosted(model).manager.chunks:
        shadow = chunk.homes.get(SHADOW)
        if chunk.homes[MASTER].tier is not Tier.DEVICE:
            found.append(shadow is not None)
        if shadow is not None:
            master = torch.empty(chunk.layout.numel)
            chunk.homes[MASTER].read(0, master)
            assert shadow.tier is Tier.HOST and torch.equal(shadow.tensor, master.bfloat16())  # type: ignore[arg-type]
            assert master.any()
    return found


def test_shadows_are_kept_while_there_is_room_and_are_the_rounded_masters() -> None:
    roomy, tight = trained(device_memory="100KiB"), trained(device_memory="100KiB", host_memory=7 * 64 * 65 * 14)
    assert all(shadows(roomy)) and len(shadows(roomy)) >= 7
    assert not any(shadows(tight))
    ours, others = masters(roomy), masters(tight)
    assert all(torch.equal(ours[name], others[name]) for name in others)
    assert roomy.memory_stats()["model_data/shadow_bytes"] == len(shadows(roomy)) * 64 * 65 * 2


def test_a_written_parameter_is_written_to_its_shadow() -> None:
    model = trained(device_memory="100KiB")
    value = {name: torch.randn_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    model.load_state_dict(value)
    assert all(shadows(model))
    x = torch.randn(4, 64)
    reference = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    reference.load_state_dict(value)
    with torch.no_grad():
        assert torch.equal(model(x), reference.bfloat16()(x.bfloat16()))


def test_in_fp32_and_without_an_optimizer_there_are_no_shadows() -> None:
    assert not any(shadows(trained(device_memory="300KiB", precision="fp32")))
    model, *_ = Booster(plugin=GeminiPlugin(telemetry=False, device_memory="1MiB")).boost(nn.Linear(8, 8))
    assert not any(shadows(model))
