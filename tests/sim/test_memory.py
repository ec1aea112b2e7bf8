"""The device's memory: what its own allocator says, what happens when there is none left, and saving from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from backend_contract import check_backend
from parity import check_at_rest
from sim_tasks import LOOP_PLACEMENTS, OnDevice, in_folder
from simulated import SimulatedDevice
from test_parity import check_loop
from torch import Tensor, nn

import gemini
from gemini.boosted import boosted
from gemini.chunk import FETCH_WORKERS, STORE_BLOCKS, AcceleratorBackend, Staging, Tier, driver_of
from gemini.errors import OutOfMemory
from gemini.memory.capacity import device_headroom

pytestmark = pytest.mark.own_process()


@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "not pinned"])
def test_the_backend_keeps_the_contract_of_backends(device: SimulatedDevice, tmp_path: Path, pin: bool) -> None:
    for seed in range(3):
        device.seed(seed)
        staging = [Staging(count, 96, pin) for count in (FETCH_WORKERS, STORE_BLOCKS)]
        check_backend(AcceleratorBackend(driver_of(torch.device("sim", 0)), staging[0], pin, staging[1]), tmp_path)


class Wide(OnDevice):
    """Large enough for the update's temporaries to be small beside it."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 128), *(nn.Linear(128, 128) for _ in range(8))]
        return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).to(self._place)


@pytest.mark.parametrize("mib", [2.5, 3.5, 8])
def test_a_device_of_any_size_trains_with_the_same_numbers(device: SimulatedDevice, mib: float) -> None:
    nbytes = int(mib * (1 << 20))
    device.set_capacity(nbytes)  # of the allocator, which never exceeds it
    refused = torch.accelerator.memory_stats()["num_ooms"]
    run = Wide({"chunk_config_dict": {1: {"chunk_size": 4096}}})
    check_loop(run, Wide(None), steps=4)
    manager = boosted(run.model).manager
    homes = {home.tier for chunk in manager.chunks for home in chunk.homes.values()}
    assert homes == ({Tier.DEVICE} if mib == 8 else {Tier.DEVICE, Tier.HOST})
    assert manager.ledger.used(Tier.DEVICE) <= torch.accelerator.memory_allocated() <= nbytes
    assert torch.accelerator.memory_stats()["num_ooms"] == refused
    check_at_rest(run.model)


def test_what_updates_take_is_measured_however_late_they_begin(device: SimulatedDevice, late_updates: None) -> None:
    """Those of the first step begin with the next forward, when the room for full copies has been fitted already."""
    device.set_capacity(5 << 19)
    run = Wide({"chunk_config_dict": {1: {"chunk_size": 4096}}})
    resting = torch.accelerator.memory_allocated()
    check_loop(run, Wide(None), steps=2)
    measured = boosted(run.model).engine.sampling.profile.heaviest[True]
    temporaries = 16 * 4 * 128 * 128  # eight in float64, at least, of a layer's weight
    assert measured.peak_bytes - resting >= temporaries
    check_at_rest(run.model)


def test_the_first_forward_takes_no_more_of_a_device_than_the_guess_says(device: SimulatedDevice) -> None:
    device.set_capacity(5 << 19)
    run = Wide({"chunk_config_dict": {1: {"chunk_size": 4096}}})
    ledger = boosted(run.model).manager.ledger
    guessed = ledger.capacity(Tier.DEVICE)
    assert guessed < (5 << 19) // 2
    run.loss(0)
    assert ledger.capacity(Tier.DEVICE) == guessed


@pytest.mark.parametrize("name", LOOP_PLACEMENTS)
def test_full_copies_and_homes_take_what_the_ledger_says(device: SimulatedDevice, tmp_path: Path, name: str) -> None:
    run = OnDevice(in_folder(LOOP_PLACEMENTS[name], tmp_path))
    before = torch.accelerator.memory_allocated()
    run.step(0)
    manager = boosted(run.model).manager
    manager.settle()
    manager.eviction.evict_idle()
    resting = torch.accelerator.memory_allocated()
    for chunk in manager.chunks:
        if manager.ledger.free(Tier.DEVICE) >= chunk.full_nbytes:
            manager.fetch(chunk)
    taken = sum(chunk.full_nbytes for chunk in manager.chunks if chunk.is_resident)
    rounding = 512 * len(manager.chunks)
    assert taken <= torch.accelerator.memory_allocated() - resting <= taken + rounding
    assert before >= manager.ledger.used(Tier.DEVICE) - taken - manager.gradient_pool.nbytes


def test_out_of_memory_is_told_and_training_goes_on(device: SimulatedDevice) -> None:
    ours, plain = OnDevice(dict(LOOP_PLACEMENTS["host"])), OnDevice(None)
    check_loop(ours, plain, steps=2)
    device.set_capacity(torch.accelerator.memory_allocated() + (64 << 10))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        ours.backward(ours.model(torch.ones(4000, 64, device="sim")).square().mean())
    assert isinstance(raised.value, OutOfMemory) or "simulated device out of memory" in str(raised.value)
    del raised
    device.set_capacity(1 << 30)
    ours.optimizer.zero_grad()
    check_at_rest(ours.model)
    for number in (2, 3):
        torch.manual_seed(number)
        expected_loss = plain.step(number)
        torch.manual_seed(number)
        assert ours.step(number) == expected_loss


@pytest.mark.parametrize("name", LOOP_PLACEMENTS)
def test_a_checkpoint_written_on_the_device_goes_on_with_the_same_numbers(
    device: SimulatedDevice, tmp_path: Path, name: str
) -> None:
    ours, plain = OnDevice(in_folder(LOOP_PLACEMENTS[name], tmp_path)), OnDevice(None)
    check_loop(ours, plain, steps=2)
    ours.booster.save_model(ours.model, str(tmp_path / "model"), shard=True)
    ours.booster.save_optimizer(ours.optimizer, str(tmp_path / "optimizer"), shard=True)
    named = dict(gemini.named_tensors(ours.model))
    assert all(value.device.type == "cpu" for value in named.values())
    again = OnDevice(dict(LOOP_PLACEMENTS["host"]))
    again.booster.load_model(again.model, str(tmp_path / "model"))
    again.booster.load_optimizer(again.optimizer, str(tmp_path / "optimizer"))
    for number in (2, 3):
        losses = []
        for run in (plain, ours, again):
            torch.manual_seed(number)
            losses.append(run.step(number))
        assert losses[0] == losses[1] == losses[2]


class Evaluated(OnDevice):
    """Between steps it is evaluated in a stream of its own, and its values are read."""

    def step(self, number: int) -> Any:
        loss = super().step(number)
        return loss, self.evaluated(number).item(), [value.sum().item() for value in self.model.state_dict().values()]

    @torch.no_grad()
    def evaluated(self, number: int) -> Tensor:
        self.model.eval()
        try:
            if not self.is_managed:
                return self.loss(number)
            training, side = torch.accelerator.current_stream(), torch.Stream("sim")
            side.wait_stream(training)
            with side:
                loss = self.loss(number)
            training.wait_stream(side)
            return loss
        finally:
            self.model.train()


def test_a_model_may_be_evaluated_in_another_stream(device: SimulatedDevice, loop_placement: dict[str, Any]) -> None:
    for seed in range(2):
        device.seed(seed)
        check_loop(Evaluated(loop_placement), Evaluated(None))


def test_telemetry_knows_the_memory_of_the_device(device: SimulatedDevice) -> None:
    from gemini.monitor.probes import process_memory

    held = torch.ones(1 << 16, device="sim")
    found = process_memory()
    assert found.device_total_bytes == device.capacity_bytes
    assert found.device_reserved_bytes >= held.nbytes


def test_memory_that_the_allocator_keeps_for_reuse_may_be_taken(device: SimulatedDevice) -> None:
    device.set_capacity(64 << 20)
    before = device_headroom(torch.device("sim", 0))
    torch.empty(48 << 20, dtype=torch.uint8, device="sim")
    assert torch.accelerator.memory_reserved() >= 48 << 20
    assert device_headroom(torch.device("sim", 0)) == before


def test_budgets_come_from_what_is_free_on_the_device(device: SimulatedDevice) -> None:
    device.set_capacity(64 << 20)
    run = OnDevice({})
    device_budget = boosted(run.model).capacities.budgets[Tier.DEVICE]
    assert 0 < device_budget.bytes <= 64 << 20 and "free memory of sim:0" in device_budget.source
    assert run.model.memory_stats()["device/capacity_bytes"] <= 64 << 20
    assert isinstance(run.model, nn.Module)
