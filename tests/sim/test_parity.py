"""Training on a device with memory and streams of its own gives the numbers of plain PyTorch on the CPU."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from divided_homes import ROOM, divide_everything, divided_buffers
from other_optimizers import make
from parity import check_equal, run_managed, run_plain
from sim_tasks import PLACEMENTS, OnDevice, expected, task
from simulated import SimulatedDevice
from torch import nn
from torch.utils.checkpoint import checkpoint

import gemini
from gemini.memory import capacity
from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.one_in(3), pytest.mark.own_process()]

few = pytest.mark.parametrize("name", ["device", "mixed", "host"])
STEPS = 3


@pytest.mark.one_in(2)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_gives_the_numbers_of_the_cpu(
    device: SimulatedDevice, placement: dict[str, Any], precision: str
) -> None:
    run, _ = run_managed(task(precision), **placement)
    check_equal(run, expected(precision))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_updates_in_backward_give_the_numbers_of_the_cpu(
    device: SimulatedDevice, placement: dict[str, Any], precision: str
) -> None:
    run, _ = run_managed(task(precision), **placement, update_in_backward=True)
    check_equal(run, expected(precision))


@few
def test_split_masters_give_the_numbers_of_the_cpu(device: SimulatedDevice, name: str) -> None:
    run, _ = run_managed(task(), **PLACEMENTS[name], split_master=True)
    check_equal(run, expected())


@few
def test_a_lazy_model_gives_the_numbers_of_an_eager_one(device: SimulatedDevice, name: str) -> None:
    run, _ = run_managed(task("fp32"), lazy=True, **PLACEMENTS[name])
    check_equal(run, expected("fp32"))


@pytest.mark.parametrize("states", ["bf16", "8bit"])
@few
def test_reduced_states_give_the_numbers_of_the_cpu(device: SimulatedDevice, name: str, states: str) -> None:
    run, _ = run_managed(task(states=states), **PLACEMENTS[name])
    plain = expected(states=states)
    assert run.losses == plain.losses
    assert all(torch.equal(run.weights[key], value) for key, value in plain.weights.items())


@few
def test_activation_checkpoints_give_the_numbers_of_the_cpu(device: SimulatedDevice, name: str) -> None:
    def prepare(model: nn.Module) -> None:
        for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
            forward = block.forward
            block.forward = lambda x, f=forward, r=bool(i % 2): checkpoint(f, x, use_reentrant=r)  # type: ignore[assignment]

    run, _ = run_managed(task(prepare=prepare), **PLACEMENTS[name])
    check_equal(run, expected())


def freeze(model: nn.Module) -> None:
    model.blocks.requires_grad_(False)  # type: ignore[union-attr]


def freeze_rounded(model: nn.Module) -> None:
    freeze(model)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks") and parameter.dim() == 2:
            parameter.data = gemini.Quantization("nf4").rounded(parameter.bfloat16())


def test_quantised_layers_give_the_numbers_of_those_dequantised_by_hand(
    device: SimulatedDevice, placement: dict[str, Any]
) -> None:
    run, _ = run_managed(task(prepare=freeze), quantize="nf4", **placement)
    check_equal(run, run_plain(task(prepare=freeze_rounded)))


class Clipped(OnDevice):
    """Two backwards a step, and the norm of their sum is clipped."""

    def step(self, number: int) -> float:
        for micro in range(2):
            loss = self.loss(2 * number + micro)
            self.backward(loss)
        if self.is_managed:
            norm = self.optimizer.clip_grad_by_norm(0.05)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert norm > 0.05
        return float(norm) + loss.item()


def check_loop(ours: OnDevice, theirs: OnDevice, steps: int = STEPS) -> None:
    """They take turns, with the same random numbers."""
    for number in range(steps):
        torch.manual_seed(number)
        expected_loss = theirs.step(number)
        torch.manual_seed(number)
        assert ours.step(number) == expected_loss
    plain = theirs.weights()
    assert not [name for name, value in ours.weights().items() if not torch.equal(value.cpu(), plain[name].cpu())]


def test_accumulated_and_clipped_gradients_give_the_numbers_of_the_cpu(
    device: SimulatedDevice, loop_placement: dict[str, Any]
) -> None:
    check_loop(Clipped(loop_placement), Clipped(None))


@pytest.mark.parametrize("name", ["device", "mixed", "host"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.01}], ids=["", "clipped"])
def test_fp16_with_a_loss_scale_gives_the_numbers_of_the_cpu(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    fp16 = {"precision": "fp16", "initial_scale": 2.0**22, "growth_interval": 2, **options}  # the first steps overflow
    ours = OnDevice(dict(PLACEMENTS[name]), **fp16)
    with monkeypatch.context() as patch:
        patch.setattr(capacity, "find_accelerator", lambda: None)
        theirs = OnDevice({}, **fp16)
    check_loop(ours, theirs, steps=6)


class Other(OnDevice):
    """Another optimizer than Adam."""

    def __init__(self, optimizer: str, *arguments: Any, **more: Any) -> None:
        self._optimizer = optimizer
        super().__init__(*arguments, **more)

    def make_optimizer(self, model: nn.Module) -> Any:
        return make(self._optimizer, list(model.parameters()))


@pytest.mark.parametrize("name", ["device", "mixed", "host"])
@pytest.mark.parametrize(
    "optimizer",
    ["SGD of Nesterov", "Adagrad", "RMSprop with all", "Adam amsgrad", "NAdam decoupled", "RAdam", "Adafactor"],
)
def test_other_optimizers_give_the_numbers_that_they_have_without_management(
    device: SimulatedDevice, name: str, optimizer: str
) -> None:
    check_loop(Other(optimizer, dict(PLACEMENTS[name])), Other(optimizer, None, place="sim"))


class Released(OnDevice):
    """Its memory is given back after each step, and taken again."""

    def step(self, number: int) -> float:
        loss = super().step(number)
        if self.is_managed:
            with tempfile.TemporaryDirectory() as folder:
                self.booster.release(self.model, folder)
                assert self.model.memory_stats()["device/used_bytes"] == 0
                self.booster.resume(self.model)
        return loss


def test_a_released_model_gives_the_numbers_of_the_cpu(device: SimulatedDevice, loop_placement: dict[str, Any]) -> None:
    check_loop(Released(loop_placement), Released(None))


def test_a_model_that_is_made_a_plain_one_has_its_values(
    device: SimulatedDevice, loop_placement: dict[str, Any]
) -> None:
    ours = OnDevice(loop_placement)
    ours.step(0)
    expected_values = {name: value.clone() for name, value in ours.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"use to_torch\(model, device='sim'\)"):
        gemini.to_torch(ours.model)
    plain = gemini.to_torch(ours.model, device="sim")
    assert {parameter.device.type for parameter in plain.parameters()} == {"sim"}
    assert all(torch.equal(value.cpu(), expected_values[name]) for name, value in plain.state_dict().items())


def test_the_unmanaged_optimizer_gives_the_numbers_of_the_cpu(device: SimulatedDevice) -> None:
    check_loop(OnDevice(None, place="sim"), OnDevice(None))


def test_a_parameter_of_the_cpu_stays_itself_on_its_way_to_the_device(device: SimulatedDevice) -> None:
    model = OnDevice.build_model(OnDevice(None))
    model[0].weight.colour = "red"  # type: ignore[union-attr,index]
    before = dict(model.named_parameters())
    managed = OnDevice({})
    managed.model = managed.booster.boost(model, HybridAdam(model.parameters()))[0]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {str(parameter.device) for parameter in before.values()} == {"sim:0"}
    assert before["0.weight"].colour == "red"


def test_a_parameter_with_hooks_is_to_be_moved_to_the_device_first(device: SimulatedDevice) -> None:
    managed = OnDevice({})
    model = nn.Linear(4, 4)
    model.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(ValueError, match=r"has hooks .*model\.to\('sim'\)"):
        managed.booster.boost(model, HybridAdam(model.parameters()))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_homes_divided_between_ram_and_disk_give_the_numbers_of_the_cpu(
    device: SimulatedDevice, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divide_everything(monkeypatch)
    chunks = {"chunk_config_dict": {1: {"chunk_size": 1 << 13}}}
    run, model = run_managed(task(precision), device_memory="200KiB", **{**ROOM, **chunks, "offload_dir": tmp_path})
    check_equal(run, expected(precision))
    assert "master" in divided_buffers(model)
