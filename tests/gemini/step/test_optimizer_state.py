"""``optimizer.state`` of a boosted optimizer means what it means in plain PyTorch, wherever the states are."""

from functools import cache
from math import isfinite
from typing import Any

import pytest
import torch
from loop import Trained, check_same
from other_optimizers import OTHER_PLACEMENTS, Other
from state_uses import EDITS, same

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

OTHERS = ["SGD with momentum", "RMSprop with all", "Adagrad", "Adam amsgrad", "Rprop"]
RESETS = {"clear", "pop_all", "delete_one", "assign_nothing_to_one", "clear_one", "new_defaultdict", "pop_items"}
RESETS |= {"new_dict_with_some", "put_aside_and_back"}
FAILS_IN_PLAIN_PYTORCH = {
    "Adagrad": RESETS,  # its states begin with the optimizer
    "SGD with momentum": {"count_from_zero"},
    "Rprop": {"zeros_for_all"},
}


def outcome(run: Trained, use: str, start: int = 0) -> Any:
    """Two steps, the use, two more: losses, what it returned, and the states."""
    torch.manual_seed(7)  # runs take turns
    losses = [run.step(step) for step in (start, start + 1)]
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    result = EDITS[use](run.optimizer, parameters)
    losses += [run.step(start + 2), run.step(start + 3)]
    return losses, result, dict(sorted(run.optimizer.state_dict()["state"].items(), key=str))


@cache
def expected(use: str) -> Any:
    run = Trained(None)
    return outcome(run, use), run


@pytest.mark.parametrize("use", EDITS)
def test_what_is_done_to_states_counts_as_in_plain_pytorch(use: str, placement: dict[str, Any]) -> None:
    ours = Trained(placement)
    wanted, plain = expected(use)
    assert same(outcome(ours, use), wanted)
    check_same(ours, plain)


@pytest.mark.parametrize("name", OTHERS)
def test_it_does_so_for_other_optimizers(name: str, tmp_path: Any) -> None:
    ours = Other(name, {**OTHER_PLACEMENTS["disk"], "offload_dir": tmp_path})
    plain = Other(name, None)
    uses = [use for use in EDITS if use not in FAILS_IN_PLAIN_PYTORCH.get(name, ())]
    for number, use in enumerate(uses):
        found, wanted = outcome(ours, use, 2 * number), outcome(plain, use, 2 * number)
        assert same(found, wanted), use
        assert all(map(isfinite, wanted[0]))
    check_same(ours, plain)
