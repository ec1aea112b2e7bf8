"""``optimizer.state`` of a boosted optimizer means what it means in plain PyTorch, wherever the states are."""

import copy
import re
from functools import cache
from math import isfinite
from typing import Any

import pytest
import torch
from loop import WIDTH, Trained, batch, check_same
from other_optimizers import OTHER_PLACEMENTS, Other
from state_uses import EDITS, same, tensors, zero_in_place
from torch import Tensor, nn

from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

PARTS = 4
"""In which other optimizers go through the edits."""
OTHERS = ["SGD with momentum", "RMSprop", "Adagrad", "Rprop"]
RESETS = {"clear", "pop_all", "delete_one", "assign_nothing_to_one", "clear_one", "new_defaultdict", "pop_items"}
RESETS |= {"new_dict_with_some", "put_aside_and_back"}
FAILS_IN_PLAIN_PYTORCH = {
    "Adagrad": RESETS,  # its states begin with the optimizer
    "SGD with momentum": {"count_from_zero"},
    "Rprop": {"zeros_for_all"},
}


def outcome(run: Trained, use: str, start: int = 0, each: int = 2) -> Any:
    """Some steps, the use, and as many more: losses, what it returned, and the states."""
    torch.manual_seed(7)  # runs take turns
    losses = [run.step(step) for step in range(start, start + each)]
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    result = EDITS[use](run.optimizer, parameters)
    losses += [run.step(step) for step in range(start + each, start + 2 * each)]
    return losses, result, dict(sorted(run.optimizer.state_dict()["state"].items(), key=str))


@cache
def expected(use: str) -> Any:
    run = Trained(None)
    return outcome(run, use), run


@pytest.mark.one_in(6)
@pytest.mark.parametrize("use", EDITS)
def test_what_is_done_to_states_counts_as_in_plain_pytorch(use: str, placement: dict[str, Any]) -> None:
    ours = Trained(placement)
    wanted, plain = expected(use)
    assert same(outcome(ours, use), wanted)
    check_same(ours, plain)


def edits_of(part: int) -> list[str]:
    """Edits that follow each other, a part of them all."""
    edits = [*EDITS]
    return edits[part * len(edits) // PARTS : (part + 1) * len(edits) // PARTS]


@pytest.mark.one_in(PARTS)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", OTHERS)
def test_it_does_so_for_other_optimizers(name: str, part: int, tmp_path: Any) -> None:
    ours = Other(name, {**OTHER_PLACEMENTS["disk"], "offload_dir": tmp_path})
    plain = Other(name, None)
    uses = [use for use in edits_of(part) if use not in FAILS_IN_PLAIN_PYTORCH.get(name, ())]
    for number, use in enumerate(uses):
        found, wanted = (outcome(run, use, number, each=1) for run in (ours, plain))
        assert same(found, wanted), use
        assert all(map(isfinite, wanted[0]))
    check_same(ours, plain)


KEPT_OTHERWISE: dict[str, dict[str, Any]] = {
    "bf16 states": {"states": "bf16"},
    "8bit states": {"states": "8bit"},
    "split masters": {"precision": "bf16", "split_master": True},
    "masters": {"precision": "bf16"},
}


class Kept(Trained):
    """With states, or masters, in another form than state dicts have."""

    def __init__(self, placement: dict[str, Any], states: str = "fp32", **plugin: Any) -> None:
        self.states = states
        super().__init__(placement, **plugin)

    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1, states=self.states)

    def loss(self, step: int) -> Any:
        return self.model(batch(step).to(next(self.model.parameters()).dtype)).float().square().mean()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kept", KEPT_OTHERWISE)
def test_edits_are_those_of_a_state_dict_where_states_are_kept_in_another_form(
    kept: str, placement: dict[str, Any], tmp_path: Any
) -> None:
    ours, theirs = (Kept(placement, **KEPT_OTHERWISE[kept]) for _ in range(2))
    parameters = list(ours.model.parameters())
    for number in range(3):
        for run in (ours, theirs):
            torch.manual_seed(7)
            run.step(number)
        saved = theirs.optimizer.state_dict()
        assert same([tensors(state) for state in ours.optimizer.state.values()], list(saved["state"].values()))
        for state in saved["state"].values():
            state["exp_avg"].view(-1)[1::3].mul_(-0.5)
            state["exp_avg_sq"].mul_(0.25)
            state["step"].add_(1)
        theirs.optimizer.load_state_dict(saved)
        for p in parameters:
            state = ours.optimizer.state[p]
            state["exp_avg"].view(-1)[1::3].mul_(-0.5)
            state["exp_avg_sq"] = state["exp_avg_sq"] * 0.25
            state["step"] += 1
    check_same(ours, theirs)


def test_what_is_handed_out_has_no_memory_and_shows_what_the_optimizer_has_now(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    held = [[state["exp_avg"] for state in run.optimizer.state.values()] for run in (ours, plain)]
    rows = [[value.view(-1)[1:] for value in values] for values in held]
    with torch._C.DisableTorchFunctionSubclass():
        assert {value.is_meta for value in (*held[0], *rows[0])} == {True}
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(1)
    assert same(*held)
    assert same(*rows)
    for value in (*held[0], *held[1]):
        value.mul_(2.0)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(2)
    check_same(ours, plain)
    assert ours.optimizer.state is ours.optimizer.state


def test_half_of_a_step_within_backward_is_shown_to_nobody(backward_placement: dict[str, Any]) -> None:
    ours, plain = Trained(backward_placement, update_in_backward=True), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
        run.backward(run.loss(1))
    p = next(iter(ours.model.parameters()))
    held, states = ours.optimizer.state[p], ours.optimizer.state
    for change in (
        lambda: held["exp_avg"].norm(),
        lambda: held["exp_avg"].zero_(),
        lambda: held.__setitem__("exp_avg", torch.zeros(p.shape)),
        lambda: held.__setitem__("step", 3),
        states.clear,
        held.clear,
        lambda: states.update({p: {}}),
        lambda: setattr(ours.optimizer, "state", {}),
    ):
        with pytest.raises(ValueError, match=r"call optimizer\.step\(\) after each backward first"):
            change()
    for run in (ours, plain):
        run.optimizer.step()
        run.optimizer.zero_grad()
        zero_in_place(run.optimizer, [])
        torch.manual_seed(7)
        run.step(2)
    check_same(ours, plain)


class Mixed(Trained):
    """A float64 layer, which is in no chunk, and a layer that is frozen until later."""

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.Linear(8, 8).double(), nn.Linear(8, 8).double(), nn.Linear(WIDTH, 8)
        )
        return Summed(model)

    def make_optimizer(self, model: Any) -> Any:
        for p in model.parts[3].parameters():
            p.requires_grad_(False)
        return HybridAdam(model.parameters(), lr=1e-2)


class Summed(nn.Module):
    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.parts
        return c(b(a(x).double())).float() + d(x)


def test_states_of_parameters_outside_of_chunks_and_of_frozen_ones_count(placement: dict[str, Any]) -> None:
    ours, plain = Mixed(placement), Mixed(None)
    for run in (ours, plain):
        run.step(0)
        wide = run.model.parts[1].weight
        run.optimizer.state[wide]["exp_avg"].mul_(0.5)
        run.optimizer.state[wide]["step"] += 2
        frozen = run.model.parts[3].weight
        moments = {name: torch.full((8, WIDTH), 0.25) for name in ("exp_avg", "exp_avg_sq")}
        run.optimizer.state[frozen] = {"step": torch.tensor(7.0), **moments}
        run.optimizer.state[wide].pop("nothing", None)
        run.step(1)
        saved = run.optimizer.state_dict()
        run.optimizer.state.clear()
        run.optimizer.load_state_dict(saved)
        run.step(2)
        for p in run.model.parts[3].parameters():
            p.requires_grad_(True)
        run.step(3)
        run.optimizer.state[frozen]["exp_avg"].mul_(0.5)
        run.step(4)
    check_same(ours, plain)
    assert same(
        [tensors(s) for s in ours.optimizer.state.values()], [tensors(s) for s in plain.optimizer.state.values()]
    )


def half_of(p: Tensor) -> dict[str, Tensor]:
    return {"step": torch.tensor(1.0), "exp_avg": torch.zeros(p.shape)}


def test_what_cannot_be_kept_is_refused_and_nothing_has_changed() -> None:
    ours = Kept({}, precision="bf16", split_master=True)
    ours.step(0)
    p, q, *_ = ours.model.parameters()
    state, before = ours.optimizer.state[p], copy.deepcopy(ours.optimizer.state_dict()["state"])
    shape = re.escape(str(tuple(p.shape)))
    refused: list[tuple[type[Exception], str, Any]] = [
        (ValueError, f"{shape}, got \\(3,\\)", lambda: state.update(exp_avg=torch.zeros(3))),
        (TypeError, "dense, real tensor of its shape, got float", lambda: state.update(exp_avg=0.5)),
        (TypeError, "complex64", lambda: state.update(exp_avg=torch.zeros(p.shape, dtype=torch.complex64))),
        (ValueError, "whole number of 0 or more, got 2.5", lambda: state["step"].fill_(2.5)),
        (ValueError, "whole number of 0 or more, got -1", lambda: state.update(step=-1)),
        (ValueError, r"optimizer\.state\.pop\(p\) forgets all", lambda: state.pop("exp_avg")),
        (ValueError, r"optimizer\.state\.pop\(p\) forgets all", lambda: state.update(exp_avg=None)),
        (ValueError, "boost without split_master", lambda: state["exp_avg_sq"].sub_(1)),
        (ValueError, "lacks exp_avg_sq.* or {} to begin anew", lambda: ours.optimizer.state.update({p: half_of(p)})),
        (ValueError, "lacks exp_avg_sq", lambda: setattr(ours.optimizer, "state", {q: {}, p: half_of(p)})),
        (TypeError, "a mapping of names to values, got int", lambda: ours.optimizer.state.update({p: 3})),
        (ValueError, f"shape is {shape}", lambda: setattr(state["exp_avg"], "data", torch.zeros(3))),
        (RuntimeError, r"data_ptr .*clone\(\)", lambda: state["exp_avg"].data_ptr()),
        (RuntimeError, r"untyped_storage .*clone\(\)", lambda: state["exp_avg"].untyped_storage()),
        (RuntimeError, r"requires_grad_ .*clone\(\)", lambda: state["exp_avg"].requires_grad_()),
        (ValueError, "read-only", lambda: state["exp_avg"].numpy().fill(0)),
        (KeyError, "nothing", lambda: state["nothing"]),
        (KeyError, "nothing", lambda: state.pop("nothing")),
    ]
    for error, message, change in refused:
        with pytest.raises(error, match=message):
            change()
    assert same(ours.optimizer.state_dict()["state"], before)
