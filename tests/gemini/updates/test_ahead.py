"""Updates that begin in backward by themselves change no number, whatever the user does before the step."""

import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, SMALL, Trained, check_same
from parity import check_at_rest
from safetensors.torch import load_file
from torch import Tensor, nn

import gemini
from gemini.boosted import boosted
from gemini.chunk import Tier
from gemini.errors import OutOfMemory
from gemini.nn.optimizer import HybridAdam
from gemini.sizes import parse_bytes
from gemini.updates.ahead import MOST_STEPS_WITHOUT, Trust, UpdatesAhead
from gemini.updates.trial import Trial
from gemini.updates.update_pipeline import UpdatePipeline

pytestmark = pytest.mark.timeout(60)

Habit = Callable[[Trained, int], float]
"""One step as some user takes it. Returns its loss."""


@pytest.fixture(params=["300KiB", "360KiB"], ids=["copies go", "copies stay"])
def placement(request: pytest.FixtureRequest, tmp_path: Any) -> dict[str, Any]:
    """Most homes are on disk, and there is room for few full copies or for some more."""
    return {"host_memory": request.param, "offload_dir": tmp_path, **SMALL}


def ahead_of(run: Trained) -> UpdatesAhead:
    found = boosted(run.model).engine.updates._ahead
    assert isinstance(found, UpdatesAhead)
    return found


class Seeded(Trained):
    """Dropout is the same in runs that take turns."""

    def loss(self, step: int) -> Tensor:
        torch.manual_seed(step)
        return super().loss(step)


class Deep(Seeded):
    """A model that is deep enough for several chunks on disk."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(layer for _ in range(2) for layer in list(super(Deep, self).build_model())[:-2]))


class Joint(Seeded):
    """Two optimizers, boosted as one."""

    def make_optimizer(self, model: nn.Module) -> Any:
        parameters = list(model.parameters())
        return [HybridAdam(some, lr=1e-2) for some in (parameters[:1], parameters[1:])]


def backward(run: Trained, step: int) -> float:
    loss = run.loss(step)
    run.backward(loss)
    return loss.item()


def end(run: Trained) -> None:
    run.optimizer.step()
    run.optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_usual_loop_has_its_updates_begun_in_backward_and_trains_as_in_ram(
    placement: dict[str, Any], precision: str
) -> None:
    ours, in_ram = Deep(placement, precision), Deep({}, precision)
    for step in range(6):
        assert ours.step(step) == in_ram.step(step)
    check_at_rest(ours.model)
    assert ahead_of(ours).taken_count > 0
    assert ahead_of(ours).trust.is_given
    theirs = in_ram.weights()
    assert not [name for name, value in ours.weights().items() if not torch.equal(value, theirs[name])]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("ends", ["step", "zero_grad", "read", "evict"])
def test_the_memory_of_full_copies_that_updates_fill_is_theirs_again(placement: dict[str, Any], ends: str) -> None:
    ours, plain = Deep({**placement, "host_memory": "360KiB"}), Deep(None)
    for step in range(4):
        assert ours.step(step) == plain.step(step)
    manager = boosted(ours.model).manager
    assert backward(ours, 4) == backward(plain, 4)
    handed_out = list(manager.full_copies.taken)
    assert handed_out
    assert not any(chunk.is_resident for chunk in handed_out)
    if ends == "read":  # what others find is the value before the step
        values = dict(plain.model.named_parameters())
        assert all(torch.equal(p.detach(), values[name]) for name, p in ours.model.named_parameters())
    elif ends == "evict":
        manager.eviction.evict_idle()
    elif ends == "zero_grad":
        ours.optimizer.zero_grad()
        plain.optimizer.zero_grad()
    if ends == "zero_grad":
        check_at_rest(ours.model)
    end(ours)
    end(plain)
    manager.settle()
    if ends == "step":
        assert all(chunk.is_valid for chunk in handed_out)
        assert not manager.full_copies.taken
    check_at_rest(ours.model)
    assert ours.step(5) == plain.step(5)
    check_same(ours, plain)


def accumulates(run: Trained, step: int) -> float:
    loss = backward(run, step)
    loss += backward(run, step + 100)
    end(run)
    return loss


def clips_by_hand(run: Trained, step: int) -> float:
    loss = backward(run, step)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    end(run)
    return loss


def doubles_a_gradient(run: Trained, step: int) -> float:
    loss = backward(run, step)
    for parameter in run.model.parameters():
        parameter.grad.mul_(2.0)
    end(run)
    return loss


def doubles_it_unseen_by_torch(run: Trained, step: int) -> float:
    loss = backward(run, step)
    for parameter in run.model.parameters():
        parameter.grad.data.mul_(2.0)
    end(run)
    return loss


def replaces_a_gradient(run: Trained, step: int) -> float:
    loss = backward(run, step)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    end(run)
    return loss


def leaves_one_out(run: Trained, step: int) -> float:
    loss = backward(run, step)
    next(iter(run.model.parameters())).grad = None
    end(run)
    return loss


def changes_the_rate(run: Trained, step: int) -> float:
    loss = backward(run, step)
    run.optimizer.param_groups[0]["lr"] *= 0.5
    end(run)
    return loss


def changes_the_rate_after_the_step(run: Trained, step: int) -> float:
    loss = run.step(step)
    run.optimizer.param_groups[0]["lr"] *= 0.9
    return loss


def forgets_every_second(run: Trained, step: int) -> float:
    loss = backward(run, step)
    if step % 2:
        run.optimizer.step()
    run.optimizer.zero_grad()
    return loss


def never_zeroes(run: Trained, step: int) -> float:
    loss = backward(run, step)
    run.optimizer.step()
    return loss


def changes_weights(run: Trained, step: int) -> float:
    loss = backward(run, step)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(0.99)
    end(run)
    return loss


def changes_states(run: Trained, step: int) -> float:
    loss = backward(run, step)
    for state in list(run.optimizer.state.values()):
        if "exp_avg" in state:
            state["exp_avg"].mul_(0.5)
    end(run)
    return loss


def looks_at_weights(run: Trained, step: int) -> float:
    loss = backward(run, step)
    loss += sum(float(parameter.detach().sum()) for parameter in run.model.parameters())
    end(run)
    return loss


def fails_between(run: Trained, step: int) -> float:
    loss = backward(run, step)
    if step % 3 == 2:
        run.optimizer.zero_grad()

        def fail(*_: Any) -> None:
            raise ValueError("in a forward")

        handle = run.model.register_forward_hook(fail)
        with pytest.raises(ValueError, match="in a forward"):
            run.loss(step)
        handle.remove()
        loss = backward(run, step)
    end(run)
    return loss


def evaluates_between(run: Trained, step: int) -> float:
    loss = backward(run, step)
    run.model.eval()
    with torch.no_grad():
        loss += run.loss(step + 50).item()
    run.model.train()
    end(run)
    return loss


def steps_with_a_hook(run: Trained, step: int) -> float:
    def halve(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)

    loss = backward(run, step)
    handle = run.optimizer.register_step_pre_hook(halve)
    end(run)
    handle.remove()
    return loss


def freezes_one(run: Trained, step: int) -> float:
    list(run.model.parameters())[2].requires_grad_(step % 2 == 0)
    return run.step(step)


def goes_back_for_one_more(run: Trained, step: int) -> float:
    loss = run.loss(step)
    loss.backward(retain_graph=True)
    loss.backward(inputs=[list(run.model.parameters())[-1]])
    end(run)
    return loss.item()


def forgets_those_of_one_optimizer(run: Trained, step: int) -> float:
    loss = backward(run, step)
    run.optimizer.parts[0].zero_grad()
    end(run)
    return loss


def has_them_called_off(run: Trained, step: int) -> float:
    loss = backward(run, step)
    ahead = boosted(run.model).engine.updates._ahead
    if isinstance(ahead, UpdatesAhead):
        ahead.call_off()
    end(run)
    return loss


HABITS: list[Habit] = [
    accumulates, clips_by_hand, doubles_a_gradient, doubles_it_unseen_by_torch, replaces_a_gradient, leaves_one_out,
    changes_the_rate, changes_the_rate_after_the_step, forgets_every_second, never_zeroes, changes_weights,
    changes_states, looks_at_weights, fails_between, evaluates_between, steps_with_a_hook, freezes_one,
]  # fmt: skip


@pytest.mark.one_in(4)
@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__.replace("_", " "))
def test_what_comes_before_the_step_counts_as_in_plain_pytorch(placement: dict[str, Any], habit: Habit) -> None:
    ours, plain = Deep(placement), Deep(None)
    for step in range(3):  # by now updates begin ahead of the step
        assert ours.step(step) == plain.step(step)
    assert ahead_of(ours).trust.is_given
    for step in range(3, 7):
        ahead_of(ours).trust.steps_without = 0  # as if nothing were learned from it
        assert habit(ours, step) == habit(plain, step)
    check_same(ours, plain)


@pytest.mark.parametrize(
    "habit",
    [goes_back_for_one_more, forgets_those_of_one_optimizer, has_them_called_off],
    ids=lambda each: each.__name__,
)
def test_the_memory_that_updates_have_when_they_are_called_off_is_no_full_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, habit: Habit
) -> None:
    ours, in_ram = Joint({**PLACEMENTS["disk"], "offload_dir": tmp_path}, "bf16"), Joint({}, "bf16")
    decided, run, call_off, confirm = threading.Event(), UpdatePipeline.run, Trial.call_off, Trial.confirm
    decided.set()

    def runs_late(pipeline: UpdatePipeline) -> None:
        assert decided.wait(20)
        run(pipeline)

    def decides(decide: Callable[[Trial], Any]) -> Callable[[Trial], Any]:
        def decided_now(trial: Trial) -> Any:
            try:
                return decide(trial)
            finally:
                decided.set()

        return decided_now

    monkeypatch.setattr(UpdatePipeline, "run", runs_late)
    monkeypatch.setattr(Trial, "call_off", decides(call_off))
    monkeypatch.setattr(Trial, "confirm", decides(confirm))
    for step in range(8):
        ahead_of(ours).trust.steps_without = 0 if step else 1
        if step > 1:
            decided.clear()  # updates that backward begins wait
        assert habit(ours, step) == habit(in_ram, step)
        decided.set()
        theirs = in_ram.weights()
        assert not [name for name, value in ours.weights().items() if not torch.equal(value, theirs[name])]
    assert ahead_of(ours).dropped_count


@pytest.mark.parametrize("use_async", [False, True], ids=["at once", "in the background"])
def test_a_save_before_the_step_has_the_values_before_the_step(
    placement: dict[str, Any], tmp_path: Any, use_async: bool
) -> None:
    ours, in_ram = Deep(placement), Deep({})
    for name, run in (("ours", ours), ("in_ram", in_ram)):
        for step in range(3):
            run.step(step)
        backward(run, 3)
        run.booster.save_model(run.model, str(tmp_path / f"{name}.safetensors"), use_async=use_async)
        end(run)
        run.step(4)
        boosted(run.model).manager.snapshots.wait()
    assert ahead_of(ours).taken_count > 0
    saved, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "in_ram"))
    assert saved.keys() == expected.keys()
    assert not [name for name, value in saved.items() if not torch.equal(value, expected[name])]
    theirs = in_ram.weights()
    assert not [name for name, value in ours.weights().items() if not torch.equal(value, theirs[name])]


def test_a_model_that_is_released_before_the_step_goes_on_with_the_same_gradients(
    placement: dict[str, Any], tmp_path: Any
) -> None:
    ours, plain = Deep(placement), Deep(None)
    for step in range(5):
        loss = backward(ours, step)
        if step == 3:
            ours.optimizer.zero_grad()
            ours.booster.release(ours.model, str(tmp_path / "parked"))
            ours.booster.resume(ours.model)
            loss = backward(ours, step)
        assert loss == backward(plain, step)
        end(ours)
        end(plain)
    assert ahead_of(ours).taken_count > 0
    check_same(ours, plain)


@pytest.mark.parametrize("capacity", ["4MiB", "296KiB"], ids=["up", "down"])
def test_homes_that_move_before_the_step_keep_their_numbers(placement: dict[str, Any], capacity: str) -> None:
    ours, plain = Deep(placement), Deep(None)
    for step in range(6):
        assert backward(ours, step) == backward(plain, step)
        if step == 3:
            boosted(ours.model).engine.resize({Tier.HOST: parse_bytes(capacity)})
        end(ours)
        end(plain)
    assert ahead_of(ours).taken_count > 0
    check_same(ours, plain)


def test_averages_follow_as_ever(placement: dict[str, Any]) -> None:
    ours, in_ram = Deep(placement), Deep({})
    averages = [gemini.EMA(run.model, 0.9) for run in (ours, in_ram)]
    for step in range(5):
        assert ours.step(step) == in_ram.step(step)
    with averages[0].swapped_in(), averages[1].swapped_in():
        theirs = in_ram.weights()
        assert not [name for name, value in ours.weights().items() if not torch.equal(value, theirs[name])]


def test_a_user_who_makes_each_guess_wrong_is_left_alone_for_longer_and_longer() -> None:
    trust, guesses = Trust(), []
    for step in range(1000):
        guesses += [step] if trust.is_given else []
        trust.after_step(was_right=not trust.is_given)
    assert len(guesses) < 25
    pauses = [b - a for a, b in pairwise(guesses)]
    assert pauses == sorted(pauses) and pauses[-1] == MOST_STEPS_WITHOUT + 1


def test_a_habit_that_contradicts_costs_few_updates_in_the_long_run(placement: dict[str, Any]) -> None:
    ours = Deep(placement)
    for step in range(12):
        accumulates(ours, step)
    assert ahead_of(ours).taken_count == 0
    assert not ahead_of(ours).trust.is_given


def test_a_step_that_has_taken_updates_is_not_torn_where_the_others_cannot_be_handed_over(
    placement: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, in_ram = Deep(placement, "fp32"), Deep({}, "fp32")
    for step in range(4):
        assert ours.step(step) == in_ram.step(step)
    backward(ours, 4)
    workers = boosted(ours.model).step._updater._queue._thread
    for chunk in boosted(ours.model).manager.chunks:
        chunk.settle()
    taken = ahead_of(ours).taken_count

    def refuse(*args: Any) -> None:
        monkeypatch.undo()
        raise MemoryError("on purpose")

    monkeypatch.setattr(workers, "submit", refuse)
    ours.optimizer.step()  # it has been taken
    assert ahead_of(ours).taken_count > taken
    with suppress(OutOfMemory):  # the others were handed over by nobody, but where the thread was still at work
        boosted(ours.model).manager.settle()
    ours.optimizer.zero_grad()
    backward(in_ram, 4)
    end(in_ram)
    for step in range(5, 7):
        assert ours.step(step) == in_ram.step(step)
    check_same(ours, in_ram)
