"""Models used in unusual ways, and how their losses come about."""

from collections.abc import Callable
from typing import Any

import torch
from odd_models import (
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
    layers,
    mean_square,
    parametrized,
    with_a_patched_forward,
    with_hooks,
)
from telling_models import Gossips
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

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
