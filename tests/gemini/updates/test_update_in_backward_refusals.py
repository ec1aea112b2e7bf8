"""What ``update_in_backward=True`` refuses: whatever needs all gradients, or would mix two steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward_runs import Run, everywhere, in_backward, parameters_of
from loop import SMALL, WIDTH, Trained, batch, check_same
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import TornStep
from gemini.nn.optimizer import HybridAdam
from gemini.updates.absent_gradient import AbsentGradient

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"precision": "fp16"}, "precision='fp16'"),
        ({"max_norm": 1.0}, "max_norm=1.0"),
        ({"enable_gradient_accumulation": True}, "enable_gradient_accumulation"),
    ],
)
def test_what_needs_all_gradients_is_refused_at_once(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"update_in_backward=True cannot go with {named}"):
        GeminiPlugin(update_in_backward=True, **arguments)


def test_no_sync_and_clipping_are_refused_before_anything_happens(backward_placement: dict[str, Any]) -> None:
    ours, plain = in_backward(backward_placement), Run(None)
    ours.step(0), plain.step(0)
    with pytest.raises(ValueError, match=r"no_sync.*boost without it"):
        ours.booster.no_sync(ours.model, ours.optimizer)
    for clip in (ours.optimizer.clip_grad_by_norm, ours.optimizer.clip_grad_by_value):
        with pytest.raises(ValueError, match=r"cannot be clipped with update_in_backward=True"):
            clip(1.0)
    loss = ours.loss(1)
    ours.backward(loss)
    with pytest.raises(ValueError, match="cannot be clipped"):
        ours.optimizer.clip_grad_by_norm(1.0)
    ours.optimizer.step()  # goes on as if nothing had been asked
    ours.optimizer.zero_grad()
    plain.step(1)
    check_same(ours, plain)


def test_filling_gradients_with_zeros_is_refused_before_anything_happens(backward_placement: dict[str, Any]) -> None:
    ours, plain = in_backward(backward_placement), Run(None)
    ours.step(0), plain.step(0)
    for clear in (ours.optimizer.zero_grad, ours.model.zero_grad):
        with pytest.raises(ValueError, match=r"filled with zeros.*call zero_grad\(\)"):
            clear(set_to_none=False)
    ours.step(1), plain.step(1)
    check_same(ours, plain)


def test_clipping_with_torch_and_a_scaler_fail_loudly(backward_placement: dict[str, Any]) -> None:
    ours = in_backward(backward_placement)
    kept = parameters_of(ours)
    ours.backward(ours.loss(0))
    assert all(isinstance(p.grad, AbsentGradient) for p in kept)
    with pytest.raises(RuntimeError, match=r"uses it up within backward.*boost without it"):
        torch.nn.utils.clip_grad_norm_(kept, 1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match="uses it up within backward"):
        scaler.unscale_(ours.optimizer)


SECONDS: dict[str, Callable[[Trained], Any]] = {
    "booster.backward": lambda run: run.backward(run.first_loss),  # type: ignore[attr-defined]
    "loss.backward": lambda run: run.first_loss.backward(),  # type: ignore[attr-defined]
    "forward": lambda run: run.loss(1),
    "evaluation": lambda run: run.model.eval()(batch(0)),
    "state_dict": lambda run: run.model.state_dict(),
    "optimizer.state_dict": lambda run: run.optimizer.state_dict(),
    "zero_grad": lambda run: run.optimizer.zero_grad(),
    "model.zero_grad": lambda run: run.model.zero_grad(),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("second", SECONDS.values(), ids=SECONDS)
def test_what_would_mix_two_steps_is_refused_and_the_step_can_go_on(
    second: Callable[[Trained], Any], backward_placement: dict[str, Any]
) -> None:
    ours, plain = in_backward(backward_placement), Run(None)
    loss = ours.loss(0)
    loss.backward(retain_graph=True)
    ours.first_loss = loss  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"update_in_backward=True.*call optimizer.step\(\)"):
        second(ours)
    ours.model.train()
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    plain.step(0)
    assert ours.step(1) == plain.step(1)
    check_same(ours, plain)


@everywhere
def test_a_second_backward_through_updated_weights_is_refused_after_the_step_too(
    backward_placement: dict[str, Any],
) -> None:
    ours = in_backward(backward_placement)
    loss = ours.loss(0)
    loss.backward(retain_graph=True)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_zero_grad_the_next_backward_is_refused(backward_placement: dict[str, Any]) -> None:
    ours, plain = in_backward(backward_placement), Run(None)
    ours.backward(ours.loss(0))
    ours.optimizer.step()
    plain.step(0)
    loss = ours.loss(1)
    with pytest.raises(ValueError, match=r"was not zeroed since the last step.*optimizer.zero_grad\(\)"):
        ours.backward(loss)
    for parameter in parameters_of(ours):
        parameter.grad = None  # as good as zero_grad
    ours.backward(loss)
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    plain.step(1)
    check_same(ours, plain)


def test_options_that_change_between_backward_and_step_are_refused(backward_placement: dict[str, Any]) -> None:
    ours, plain = in_backward(backward_placement), Run(None)
    ours.backward(ours.loss(0))
    ours.optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"lr of group 0 was 0.01 when backward updated.*and is 0.5 now"):
        ours.optimizer.step()
    ours.optimizer.param_groups[0]["lr"] = 0.01
    ours.optimizer.step()
    ours.optimizer.zero_grad()
    plain.step(0)
    ours.optimizer.param_groups[0]["lr"] = plain.optimizer.param_groups[0]["lr"] = 0.5
    assert ours.step(1) == plain.step(1)
    check_same(ours, plain)


@pytest.mark.parametrize("value", [None, torch.zeros(WIDTH)], ids=["forgotten", "replaced"])
def test_gradients_that_are_changed_after_their_use_are_refused(value: Any, backward_placement: dict[str, Any]) -> None:
    ours = in_backward(backward_placement)
    bias = next(p for p in parameters_of(ours) if p.shape == (WIDTH,))
    ours.backward(ours.loss(0))
    shown, bias.grad = bias.grad, value
    with pytest.raises(ValueError, match=r"bias was changed between backward and step\(\)"):
        ours.optimizer.step()
    bias.grad = shown
    ours.optimizer.step()


def test_code_that_forward_did_not_show_is_refused_within_backward() -> None:
    """A module that runs in backward only, after its weights were updated: its numbers would be of another step."""
    torch.manual_seed(0)
    inner = nn.Linear(WIDTH, WIDTH, bias=False)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            with torch.no_grad():
                return gradient + inner(gradient)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(Again.apply(self.first(x))))  # type: ignore[no-any-return]

    model: Any = Model()
    plugin = GeminiPlugin(precision="fp32", telemetry=False, update_in_backward=True, **SMALL)
    model, optimizer, *_ = Booster(plugin=plugin).boost(model, HybridAdam(model.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match=r"inner, run again by backward, uses chunk .* when backward has updated it"):
        model(batch(0)).sum().backward()
    with pytest.raises(TornStep):
        optimizer.step()
