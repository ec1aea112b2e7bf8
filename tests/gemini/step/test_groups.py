"""Parameters that leave their group, move to another one, and come back, go as in plain PyTorch."""

from typing import Any

import pytest
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
