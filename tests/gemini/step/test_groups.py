"""Parameters that leave their group, move to another one, and come back, go as in plain PyTorch."""

from typing import Any

import pytest
import torch
from backward_runs import Run
from loop import check_same
from torch import nn

from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread")]


class Grouped(Run):
    def make_optimizer(self, model: nn.Module) -> Any:
        parameters = list(model.parameters())
        return HybridAdam([{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 1e-3}], lr=1e-2)


@pytest.mark.parametrize("in_backward", [False, True])
def test_groups_count_as_they_are_when_the_step_is_taken(in_backward: bool, placement: dict[str, Any]) -> None:
    ours, plain = Grouped(placement, update_in_backward=in_backward), Grouped(None)
    losses = []
    for run in (ours, plain):
        found = [run.step(0)]
        first, second = (group["params"] for group in run.optimizer.param_groups)
        taken = [first.pop(), second.pop(0)]
        second.append(first.pop(1))
        found += [run.step(1), run.step(2)]
        run.model.zero_grad()  # the optimizer's does not know of those that were taken out
        first += taken
        losses.append([*found, run.step(3)])
    assert losses[0] == losses[1]
    check_same(ours, plain)


class GivenToBoost(Run):
    """Keeps the optimizer that was given, and not the one that came back."""

    def make_optimizer(self, model: nn.Module) -> Any:
        parameters = list(model.parameters())
        self.given = torch.optim.SGD([{"params": parameters[::2]}, {"params": parameters[1::2]}], 1e-2, momentum=0.9)
        return self.given


def test_groups_that_are_assigned_count(placement: dict[str, Any]) -> None:
    ours, plain = GivenToBoost(placement), GivenToBoost(None)
    losses = []
    for run in (ours, plain):
        found = [run.step(0)]
        first, second = run.given.param_groups
        run.given.param_groups = [{**second, "lr": 3e-3}, {**first, "params": first["params"][1:]}]
        found += [run.step(1), run.step(2)]
        assert run.given.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"] == 3e-3
        losses.append(found)
    assert losses[0] == losses[1]
    check_same(ours, plain)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_the_gradients_of_parameters_in_no_group(set_to_none: bool, placement: dict[str, Any]) -> None:
    ours, plain = Grouped(placement), Grouped(None)
    losses = []
    for run in (ours, plain):
        found = [run.step(0)]
        first, second = (group["params"] for group in run.optimizer.param_groups)
        taken = [first.pop(), first.pop(1), second.pop(0)]
        for number in (1, 2, 3):  # those of the parameters that were taken out add up
            loss = run.loss(number)
            run.backward(loss)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none)
            found.append(loss.item())
        first += taken
        losses.append([*found, run.step(4)])
    assert losses[0] == losses[1]
    check_same(ours, plain)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", ["norm", "infinity norm", "value"])
def test_clipping_looks_at_parameters_in_groups_alone(how: str, placement: dict[str, Any]) -> None:
    ours, plain = Grouped(placement), Grouped(None)
    found: list[list[Any]] = []
    for run in (ours, plain):
        first, second = (group["params"] for group in run.optimizer.param_groups)
        taken = [first.pop(), second.pop(0)]
        run.backward(run.loss(0))
        if how == "value":
            run.optimizer.clip_grad_by_value(1e-4)
            found.append([])
        else:
            found.append([float(run.optimizer.clip_grad_by_norm(1e-3, 2.0 if how == "norm" else float("inf")))])
        run.optimizer.step()
        run.optimizer.zero_grad()
        first += taken
        found[-1].append(run.step(1))
    assert found[0] == found[1]
    check_same(ours, plain)


def test_max_norm_is_of_parameters_in_groups_alone(placement: dict[str, Any]) -> None:
    ours, plain = Grouped(placement, max_norm=1e-3), Grouped(None)
    for run in (ours, plain):
        first, second = (group["params"] for group in run.optimizer.param_groups)
        taken = [first.pop(), second.pop(0)]
        for number in range(2):
            run.backward(run.loss(number))
            if run is plain:
                nn.utils.clip_grad_norm_([p for p in run.model.parameters() if not _is_in(p, taken)], 1e-3)
            run.optimizer.step()
            run.model.zero_grad()
        first += taken
    check_same(ours, plain)


def _is_in(parameter: nn.Parameter, parameters: list[nn.Parameter]) -> bool:
    return any(parameter is other for other in parameters)
