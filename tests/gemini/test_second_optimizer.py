"""A boosted model is given a second optimizer: it trains as in plain PyTorch, and what cannot be is refused before."""

from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, check_same
from torch import nn

from gemini.boosted import boosted
from gemini.boosting.succession import give_optimizer, optimizer_of
from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread")]


class Second(Trained):
    """Goes on with another optimizer."""

    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)

    def go_on_with(self, optimizer: Any) -> None:
        self.optimizer = give_optimizer(self.model, optimizer) if self.is_managed else optimizer


def both(placement: dict[str, Any], **plugin: Any) -> tuple[Second, Second]:
    ours, plain = Second(placement, **plugin), Second(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.model.eval()  # without dropout, so that two can take turns
        for number in range(2):
            run.step(number)
    return ours, plain


def parameters(run: Trained) -> list[nn.Parameter]:
    return list(run.model.parameters())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("in_backward", [False, True])
def test_states_begin_anew_and_those_of_the_first_stay_with_who_has_them(
    in_backward: bool, placement: dict[str, Any]
) -> None:
    ours, plain = both(placement, update_in_backward=in_backward)
    held = []
    for run in (ours, plain):
        first, states = parameters(run)[0], run.optimizer.state
        held.append((states, states[first], states[parameters(run)[1]]["exp_avg"]))
        before = [value.clone() for value in (held[-1][1]["exp_avg"], held[-1][2])]
        run.go_on_with(HybridAdam(run.model.parameters(), lr=3e-3))
        assert not run.optimizer.state
        for number in range(2, 5):
            run.step(number)
        assert int(run.optimizer.state[first]["step"]) == 3
        assert int(held[-1][1]["step"]) == 2
        assert torch.equal(held[-1][0][first]["exp_avg"], before[0])
        assert torch.equal(held[-1][2], before[1])
    check_same(ours, plain)


def test_states_that_the_second_brings_count(placement: dict[str, Any]) -> None:
    ours, plain = both(placement)
    for run in (ours, plain):
        second = HybridAdam(run.model.parameters(), lr=3e-3)
        for index, parameter in enumerate(parameters(run)[::2]):
            second.state[parameter] = {
                "step": torch.tensor(float(index)),
                "exp_avg": torch.full(parameter.shape, 0.1),
                "exp_avg_sq": torch.full(parameter.shape, 0.01),
                "note": "kept",
            }
        run.go_on_with(second)
        assert run.optimizer.state[parameters(run)[0]]["note"] == "kept"
        for number in range(2, 4):
            run.step(number)
    check_same(ours, plain)


def test_a_torch_optimizer_that_is_the_second_does_what_the_managed_one_does(placement: dict[str, Any]) -> None:
    ours, plain = both(placement)
    for run in (ours, plain):
        second = torch.optim.AdamW(run.model.parameters(), lr=3e-3, fused=True)
        schedule = torch.optim.lr_scheduler.StepLR(second, 1, 0.5)
        run.go_on_with(second)
        for number in range(2, 4):
            run.step(number)
            schedule.step()
        run.optimizer = second
        run.step(4)
        assert second.param_groups[0]["lr"] == 3e-3 / 4
    assert optimizer_of(ours.model, ours.optimizer) is boosted(ours.model).optimizer
    check_same(ours, plain)


class Frozen(Second):
    """Boosted with its first layer frozen, without an optimizer of it."""

    def build_model(self) -> nn.Module:
        model = super().build_model().eval()
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("placement", [{}, PLACEMENTS["streamed"]], ids=["resident", "streamed"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_frozen_parameters_of_the_second_get_room_when_they_are_unfrozen(
    in_backward: bool, placement: dict[str, Any]
) -> None:
    ours, plain = Frozen(placement, update_in_backward=in_backward), Frozen(None)
    for run in (ours, plain):
        run.step(0)
        run.go_on_with(HybridAdam(run.model.parameters(), lr=3e-3))
        run.step(1)
    manager = boosted(ours.model).manager
    (chunk, _) = manager.find(parameters(ours)[0])  # type: ignore[misc]
    assert not chunk.is_trainable
    for run in (ours, plain):
        run.model[0].requires_grad_(True)
        for number in range(2, 4):
            run.step(number)
    check_same(ours, plain)


class Inferring(Second):
    """Boosted without an optimizer."""

    def make_optimizer(self, model: nn.Module) -> Any:
        model.eval()
        return None


@pytest.mark.parametrize("placement", [{}, PLACEMENTS["streamed"]], ids=["resident", "streamed"])
def test_a_model_that_was_boosted_for_inference_is_trained(placement: dict[str, Any]) -> None:
    ours, plain = Inferring(placement), Inferring(None)
    for run in (ours, plain):
        with torch.no_grad():
            run.loss(0)
        run.go_on_with(HybridAdam(run.model.parameters(), lr=3e-3))
        for number in range(1, 4):
            run.step(number)
    check_same(ours, plain)


def test_updates_in_backward_need_the_optimizer_from_the_start() -> None:
    run = Inferring({}, update_in_backward=True)
    with pytest.raises(ValueError, match="boost the model with its optimizer"):
        run.go_on_with(HybridAdam(run.model.parameters()))


def test_what_cannot_go_on_is_refused_and_the_first_goes_on(placement: dict[str, Any]) -> None:
    ours, plain = both(placement)
    model, first = ours.model, ours.optimizer
    other = nn.Linear(2, 2)
    wrong = HybridAdam(model.parameters())
    wrong.state[parameters(ours)[0]] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}
    elsewhere: Any = Second({}).optimizer
    torch_optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for second, error, text in (
        (HybridAdam(other.parameters()), ValueError, "none of the 2 parameters"),
        (elsewhere, ValueError, "belongs to another boosted model"),
        (HybridAdam(model.parameters(), states="8bit"), ValueError, "build the model anew"),
        (torch_optimizer, ValueError, "build the model anew"),
        (wrong, ValueError, "exp_avg"),
        (torch.optim.LBFGS(model.parameters()), TypeError, "LBFGS"),
    ):
        with pytest.raises(error, match=text):
            give_optimizer(model, second)
    assert give_optimizer(model, first) is first
    for run in (ours, plain):
        run.step(2)
    check_same(ours, plain)


def test_the_first_optimizer_refuses_everything_after_that() -> None:
    run = Second({})
    run.step(0)
    first = run.optimizer
    run.go_on_with(HybridAdam(run.model.parameters()))
    uses: list[Any] = [
        first.step, first.zero_grad, first.state_dict, lambda: first.state, lambda: first.clip_grad_by_norm(1.0),
        lambda: first.clip_grad_by_value(1.0), lambda: setattr(first, "state", {}),
        lambda: first.load_state_dict({"state": {}, "param_groups": []}),
        lambda: first.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match="has been given another one since"):
            use()
    with pytest.raises(ValueError, match="another optimizer has taken its place"):
        give_optimizer(run.model, first)
