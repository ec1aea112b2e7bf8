"""Which optimizer a boosted model has: the one that it was boosted with, and others that take its place later."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..boosted import Boosted, boosted
from ..nn.optimizer.acceptance import accepted, unchanged_on_failure
from ..nn.optimizer.given import GivenOptimizer, let_ask
from ..nn.optimizer.managed import ManagedOptimizer
from ..step.succession import Superseded
from .refusals import refuse_optimizer, refuse_split_master


def bind_optimizer(state: Boosted, optimizer: ManagedOptimizer) -> None:
    """Let the optimizer hand its work to the model's step."""
    state.serve(optimizer)
    optimizer.be_managed(state.step)
    for each in (optimizer, *optimizer.parts):
        if (given := each.stands_for()) is not None:
            let_ask(given, each)


def optimizer_of(model: nn.Module, given: Optimizer | None) -> ManagedOptimizer | None:
    """The optimizer of a boosted model, if it is the one given or was made in its place; else None."""
    current = boosted(model).optimizer
    if current is None or given is None:
        return None
    return current if given is current or given is current.stands_for() else None


def give_optimizer(model: nn.Module, optimizer: Optimizer) -> ManagedOptimizer:
    """Let a boosted model be trained by a new optimizer from now on, as plain PyTorch does with a second optimizer.

    States begin anew, or are those that the optimizer brings. The optimizer that the model had so far refuses to be
    used.

    Returns
    -------
    ManagedOptimizer
        The optimizer, or what it has become, as from `Booster.boost`.

    Raises
    ------
    TypeError
        If the optimizer cannot be managed.
    OutOfMemory, ValueError
        If it has been boosted before, or there is no room for its states. The optimizer before it goes on then.
    """
    state = boosted(model)
    if (current := optimizer_of(model, optimizer)) is not None:
        return current
    if _was_boosted(optimizer):
        raise ValueError(
            "this optimizer belongs to another boosted model, or another optimizer has taken its place since: give the "
            "model the optimizer that it has, or a new one"
        )
    with unchanged_on_failure(optimizer):
        managed = accepted(optimizer)
        _refuse(state, model, managed)
        state.step.succeed(managed)
    if state.optimizer is not None:
        state.optimizer.be_managed(Superseded())
    bind_optimizer(state, managed)
    return managed


def _was_boosted(optimizer: Any) -> bool:
    return isinstance(optimizer, GivenOptimizer) or getattr(optimizer, "_managed", None) is not None


def _refuse(state: Boosted, model: nn.Module, optimizer: ManagedOptimizer) -> None:
    refuse_optimizer(model, optimizer)
    if state.config.split_master:
        refuse_split_master(model, optimizer)
    if state.config.update_in_backward and state.optimizer is None:
        raise ValueError(
            "this model was boosted without an optimizer, and update_in_backward=True needs to know it from the "
            "start: boost the model with its optimizer, or without update_in_backward"
        )
