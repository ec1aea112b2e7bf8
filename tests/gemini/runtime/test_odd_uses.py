"""Models used in unusual ways: parameters, graphs and modules that no hook of a module sees."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd_models import (
    SMALL,
    WIDTH,
    BorrowsAWeight,
    Boxed,
    CallsItself,
    Checkpointed,
    ChoosesHard,
    EncoderDecoder,
    Forces,
    LeavesAPenalty,
    ListsOfParameters,
    Penalised,
    RandomDepth,
    RecurrentCells,
    Renormalised,
    RoutesTokens,
    RunsAPartTwice,
    Tied,
    UsesWhatReturnsNothing,
    batches,
    layers,
    mean_square,
    parametrized,
    with_a_patched_forward,
    with_hooks,
)
from parity import Task, check_equal, check_parity, run_managed, tightest
from telling_models import Gossips
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.usefixtures("one_thread")

Use = tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]
"""A model and how its loss comes about."""


def clipped(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        for layer in (model.encoder[0], model.head):
            layer.weight.clamp_(-0.1, 0.1)
    return mean_square(model, x)


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    output = mean_square(model, x)
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    return output + gradient.square().sum()


def gradient_penalty_of_a_checkpoint(model: nn.Module, x: Tensor) -> Tensor:
    return gradient_penalty(lambda x: checkpoint(model, x, use_reentrant=False), x)  # type: ignore[arg-type]


def penalty_on_gradients_of_weights(model: Any, x: Tensor) -> Tensor:
    output = mean_square(model, x)
    gradients = torch.autograd.grad(output, [model[0].weight, model[4].weight], create_graph=True)
    return output + sum(g.square().sum() for g in gradients)


def scaled_by_its_gradients(model: Any, x: Tensor) -> Tensor:
    output = mean_square(model, x)
    gradients = torch.autograd.grad(output, [model[0].weight, model[4].bias], retain_graph=True)
    return output * (1 + sum(g.norm() for g in gradients).item())


def backward_twice(model: nn.Module, x: Tensor) -> Tensor:
    output = mean_square(model, x)
    output.backward(retain_graph=True)
    return output * 2


def only_some_inputs(model: Any, x: Tensor) -> Tensor:
    mean_square(model, x).backward(inputs=[model[2].weight])
    return mean_square(model, x * 2)


def penalty_on_weights(model: Any, x: Tensor) -> Tensor:
    return mean_square(model, x) + 0.1 * model[2].weight.square().sum() + 0.1 * model[0].weight.norm()


def penalty_on_all(model: nn.Module, x: Tensor) -> Tensor:
    return mean_square(model, x) + 0.1 * sum(p.square().sum() for p in model.parameters())


def forgotten_graph(model: nn.Module, x: Tensor, kept: list[Tensor] = []) -> Tensor:  # noqa: B006
    kept.append(model(x))
    return mean_square(model, x)


def with_evaluation_between(model: nn.Module, x: Tensor) -> Tensor:
    output = mean_square(model, x)
    model.eval()
    with torch.no_grad():
        more = mean_square(model, x)
    model.train()
    return output + more


def of_a_functional_call(model: Any, x: Tensor) -> Tensor:
    encoder = model.encoder
    return mean_square(model, x) + functional_call(encoder, dict(encoder.named_parameters()), (x,)).square().mean()


USES: dict[str, Use] = {
    "a part of the model only": (EncoderDecoder, lambda m, x: mean_square(m.encoder, x)),
    "a method that is not forward": (EncoderDecoder, lambda m, x: m.encode(x).square().mean()),
    "forward called directly": (EncoderDecoder, lambda m, x: m.forward(x).square().mean()),
    "forward with a borrowed weight": (lambda: BorrowsAWeight(1), lambda m, x: m.forward(x).square().mean()),
    "a part, then the whole": (EncoderDecoder, lambda m, x: mean_square(m.encoder, x) + mean_square(m, x)),
    "a weight borrowed later": (lambda: BorrowsAWeight(3), mean_square),
    "a weight borrowed in evaluation": (lambda: BorrowsAWeight(2), with_evaluation_between),
    "a model that calls itself": (CallsItself, mean_square),
    "penalty on weights": (layers, penalty_on_weights),
    "penalty on all parameters": (layers, penalty_on_all),
    "gradient penalty": (layers, gradient_penalty),
    "gradient penalty of a checkpoint": (layers, gradient_penalty_of_a_checkpoint),
    "penalty on gradients of weights": (layers, penalty_on_gradients_of_weights),
    "derivative within forward": (Forces, mean_square),
    "autograd.grad": (layers, scaled_by_its_gradients),
    "retain_graph": (layers, backward_twice),
    "backward with inputs": (layers, only_some_inputs),
    "graph that nobody uses": (layers, forgotten_graph),
    "penalty in an attribute": (lambda: Penalised(LeavesAPenalty), mean_square),
    "penalty in an attribute alone": (lambda: Penalised(ChoosesHard), mean_square),
    "penalties told to somebody else": (lambda: Gossips(True), lambda m, x: m(x)),
    "penalties told to somebody else alone": (lambda: Gossips(False), lambda m, x: m(x)),
    "penalties told to somebody else later": (lambda: Gossips(True, silent=2), lambda m, x: m(x)),
    "objects as inputs and outputs": (Boxed, mean_square),
    "module that returns nothing": (UsesWhatReturnsNothing, mean_square),
    "reentrant checkpoint": (lambda: Checkpointed(True, False), mean_square),
    "nested reentrant checkpoint": (lambda: Checkpointed(True, True), mean_square),
    "checkpoint": (lambda: Checkpointed(False, False), mean_square),
    "nested checkpoint": (lambda: Checkpointed(False, True), mean_square),
    "recurrent cells": (RecurrentCells, mean_square),
    "lists of parameters": (ListsOfParameters, mean_square),
    "random depth": (RandomDepth, mean_square),
    "experts by the data": (RoutesTokens, mean_square),
    "tied embedding": (Tied, mean_square),
    "with and without gradients": (RunsAPartTwice, mean_square),
    "parametrizations": (parametrized, mean_square),
    "hooks of the user": (with_hooks, mean_square),
    "patched forward": (with_a_patched_forward, mean_square),
    "functional_call": (EncoderDecoder, of_a_functional_call),
}


IN_PLACE: dict[str, Use] = {
    "weights renormalised by forward": (Renormalised, mean_square),
    "weights clipped in place": (EncoderDecoder, clipped),
}


@pytest.mark.parametrize(("build", "loss"), [*USES.values(), *IN_PLACE.values()], ids=[*USES, *IN_PLACE])
def test_an_unusual_use_trains_as_without_management(build: Any, loss: Any) -> None:
    def task() -> Task:
        return Task(build, batches(4), loss)

    check_parity(task())
    for prefetch in ({}, {"max_prefetch": 0}):
        # Every error names a capacity; following them leads to the smallest that works.
        capacity = tightest(task(), "device", **prefetch, **SMALL)
        check_parity(task(), device_memory=capacity, **prefetch, **SMALL)


class FailsAtFirst(nn.Linear):
    has_failed = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).sin()
        if not self.has_failed:
            self.has_failed = True
            raise ArithmeticError(f"with {y.numel()} numbers")
        return y


def test_a_call_that_failed_tells_nothing_of_what_a_unit_leaks() -> None:
    model = FailsAtFirst(WIDTH, WIDTH)
    model, *_ = Booster(plugin=GeminiPlugin(precision="fp32")).boost(model, HybridAdam(model.parameters()))
    unit = boosted(model).hooks._units.of[model]
    with pytest.raises(ArithmeticError):
        model(batches(1)[0])
    assert unit.leaks_graph is None
    model(batches(1)[0])
    assert unit.leaks_graph is False


@pytest.mark.heavy
@pytest.mark.parametrize(("build", "loss"), USES.values(), ids=USES)
def test_an_unusual_use_trains_as_without_management_in_bf16_and_from_disk(
    build: Any, loss: Any, tmp_path: Any
) -> None:
    check_parity(Task(build, batches(4), loss), host_memory="420KiB", offload_dir=tmp_path, **SMALL)
    data = [x.bfloat16() for x in batches(4)]
    capacity = tightest(Task(build, data, loss, "bf16"), "device", **SMALL)
    check_parity(Task(build, data, loss, "bf16"), device_memory=capacity, **SMALL)


@pytest.mark.parametrize(("build", "loss"), IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_changed_in_place_reaches_the_masters_wherever_they_are(build: Any, loss: Any, tmp_path: Any) -> None:
    """Not compared with the unmanaged optimizer, whose masters overwrite what is done to bf16 parameters."""
    task = Task(build, [x.bfloat16() for x in batches(4)], loss, "bf16")
    resident, model = run_managed(task)
    assert boosted(model).manager.moves.evict_count == 0
    untouched, _ = run_managed(Task(task.build, task.batches, _unedited, "bf16"))
    assert any(not torch.equal(resident.weights[name], untouched.weights[name]) for name in resident.weights)
    for plugin in ({"device_memory": tightest(task, "device", **SMALL)}, {"host_memory": "420KiB"}):
        streamed, _ = run_managed(task, offload_dir=tmp_path, **plugin, **SMALL)
        check_equal(streamed, resident)


def _unedited(model: Any, x: Tensor) -> Tensor:
    if isinstance(model, Renormalised):
        model.embedding.max_norm = None
    return mean_square(model, x)
