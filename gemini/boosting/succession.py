"""Which optimizer a boosted model has: the one that it was boosted with, and others that take its place later."""

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..boosted import Boosted, boosted
from ..nn.optimizer.acceptance import accepted
from ..nn.optimizer.managed import ManagedOptimizer
from ..step.succession import Superseded


def bind_optimizer(state: Boosted, optimizer: ManagedOptimizer) -> None:
    """Let the optimizer hand its work to the manager, which counts its steps."""
    state.optimizer = optimizer
    optimizer._managed = state.step
    optimizer.register_step_post_hook(_counting(weakref.ref(state)))


def optimizer_of(model: nn.Module, given: Optimizer | None) -> ManagedOptimizer | None:
    """The optimizer of a boosted model, if it is the one given or was made in its place; else None."""
    current = boosted(model).optimizer
    if current is None or given is None:
        return None
    is_same = current is given or (current.stands_for is not None and current.stands_for() is given)
    return current if is_same else None


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
        If it has been boosted before, there is no room for its states, or it leaves out parameters. The optimizer
        before it goes on then.
    """
    state = boosted(model)
    if (current := optimizer_of(model, optimizer)) is not None:
        return current
    managed = accepted(optimizer)
    if managed._managed is not None:
        raise ValueError(
            "this optimizer belongs to another boosted model, or another optimizer has taken its place since: give the "
            "model the optimizer that it has, or a new one"
        )
    state.step.succeed(managed)
    if state.optimizer is not None:
        state.optimizer._managed = Superseded()
    bind_optimizer(state, managed)
    return managed


def _counting(state: "weakref.ref[Boosted]") -> Any:
    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        target = state()
        if target is not None:
            target.after_step()

    return after_step
