"""Parameters and gradients in use outside of forward, in streams and threads of the user's own."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sim_tasks import SEED, OnDevice
from simulated import SimulatedDevice
from torch import Tensor

pytestmark = [pytest.mark.one_in(3), pytest.mark.own_process()]

ORDERS = [(SEED, 0.0, 1.0), (SEED, 0.3, 0.5), (SEED + 1, 0.0, 1.0), (SEED + 1, 0.3, 0.5)]
"""Seed, and the chances that the device goes on by itself and that a wait runs only what it needs."""
STEPS = 3


class Used(OnDevice):
    """Between steps, and between backward and step, something is done to it."""

    between: Callable[["Used"], Any] = staticmethod(lambda run: None)
    before_step: Callable[["Used"], Any] = staticmethod(lambda run: None)

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.sides: list[torch.Stream] = []
        self.kept: list[Tensor] = []

    def step(self, number: int) -> Any:
        seen = self.between(self)
        loss = self.loss(number)
        self.backward(loss)
        also_seen = self.before_step(self)
        for side in self.sides:  # the step writes to what they read
            torch.accelerator.current_stream().wait_stream(side)
        self.sides.clear()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), _known(seen), _known(also_seen)


def _known(value: Any) -> Any:
    torch.accelerator.synchronize()  # the reader's own stream is not waited for by `item`
    return [each.cpu().tolist() if isinstance(each, Tensor) else each for each in value or ()]


def check(device: SimulatedDevice, placement: dict[str, Any], **uses: Callable[[Used], Any]) -> None:
    """Uses come to the same on the device, whatever the order of streams is, as on the CPU."""

    class Using(Used):
        between = staticmethod(uses.get("between", Used.between))
        before_step = staticmethod(uses.get("before_step", Used.before_step))

    plain = Using(None)
    expected = [plain.step(number) for number in range(STEPS)]
    weights = plain.weights()
    for order in ORDERS:
        device.seed(*order)
        ours = Using(placement)
        assert [ours.step(number) for number in range(STEPS)] == expected, order
        for name, value in ours.weights().items():
            assert torch.equal(value.cpu(), weights[name]), (name, order)


def norms(run: Used) -> list[Tensor]:
    return [p.detach().float().norm() for p in run.model.parameters()]


def in_a_stream(use: Callable[[Used], Any]) -> Callable[[Used], Any]:
    """In a stream that waits for the training's, and for which the training does not wait before the step."""

    def used(run: Used) -> Any:
        if not run.is_managed:
            return use(run)
        side = torch.Stream("sim")
        run.sides.append(side)
        side.wait_stream(torch.accelerator.current_stream())
        with side:
            return use(run)

    return used


def in_a_thread(use: Callable[[Used], Any]) -> Callable[[Used], Any]:
    def used(run: Used) -> Any:
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.extend(use(run)))
        thread.start()
        thread.join(60)
        return seen

    return used


def test_values_may_be_read_in_a_stream_that_training_does_not_wait_for(
    device: SimulatedDevice, loop_placement: dict[str, Any]
) -> None:
    check(device, loop_placement, between=in_a_stream(norms))


def test_values_may_be_read_by_a_thread_in_a_stream_of_its_own(
    device: SimulatedDevice, loop_placement: dict[str, Any]
) -> None:
    check(device, loop_placement, between=in_a_thread(in_a_stream(norms)), before_step=in_a_thread(in_a_stream(norms)))


def zero(run: Used) -> list[Tensor]:
    run.optimizer.zero_grad(set_to_none=False)
    return [p.grad.clone() for p in run.model.parameters()]


def test_gradients_that_are_zeroed_before_they_have_arrived_are_zero(
    device: SimulatedDevice, loop_placement: dict[str, Any]
) -> None:
    check(device, loop_placement, before_step=zero)


def keep(run: Used) -> list[Tensor]:
    seen = [value.clone() for value in run.kept]
    run.kept = [p.data for p in run.model.parameters()]
    return seen


def change_what_is_kept(run: Used) -> list[Tensor]:
    for value in run.kept:
        value.mul_(0.5)
    return keep(run)


@pytest.mark.parametrize("use", [keep, change_what_is_kept])
def test_values_that_are_kept_over_steps_are_those_of_the_last_step(
    device: SimulatedDevice, loop_placement: dict[str, Any], use: Callable[[Used], Any]
) -> None:
    check(device, loop_placement, between=use)


def assign(run: Used) -> list[Tensor]:
    """Values that were made in another stream, whose memory goes back to it as soon as nothing holds it."""
    side = torch.Stream("sim") if run.is_managed else None
    with side or nullcontext():
        values = [torch.full_like(p.data, 0.01, device=p.device) for p in run.model.parameters()]
    if side is not None:
        torch.accelerator.current_stream().wait_stream(side)
    for p, value in zip(run.model.parameters(), values, strict=True):
        p.data = value
    numels = [value.numel() for value in values]
    del value, values
    with side or nullcontext():
        for numel in numels:
            torch.full((numel,), 7.0, device=p.device)
    return [p.detach().clone() for p in run.model.parameters()]


def test_values_that_come_from_another_stream_may_be_assigned(
    device: SimulatedDevice, loop_placement: dict[str, Any]
) -> None:
    check(device, loop_placement, between=assign)


def test_values_that_are_kept_over_steps_follow_split_masters_too(
    device: SimulatedDevice, loop_placement: dict[str, Any]
) -> None:
    class Keeping(Used):
        between = staticmethod(keep)

    whole = Keeping(loop_placement, "bf16")
    expected = [whole.step(number) for number in range(STEPS)]
    for order in ORDERS:
        device.seed(*order)
        split = Keeping(loop_placement, "bf16", split_master=True)
        assert [split.step(number) for number in range(STEPS)] == expected, order
