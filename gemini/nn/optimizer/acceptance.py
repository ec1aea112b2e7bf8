"""Which optimizers can be boosted, and what to tell about the others."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.optim import Optimizer

from .elementwise_optimizer import ElementwiseOptimizer, rule_of
from .hybrid_adam import HybridAdam
from .joint import JointOptimizer
from .managed import ManagedOptimizer
from .rules import elementwise
from .rules.adam_rule import ADAM
from .rules.rules import OneRule, Rules

_WHOLE_TENSOR = {
    "adafactor": "factors the second moment of a matrix into its rows and columns",
    "lamb": "scales each tensor's update by norms of the whole tensor",
    "lars": "scales each tensor's update by norms of the whole tensor",
    "lbfgs": "searches along directions made from all parameters at once",
    "muon": "makes each matrix's update orthogonal",
    "shampoo": "multiplies each matrix with preconditioners of its rows and columns",
    "soap": "rotates each matrix into the basis of its preconditioners",
}
"""By lower-case name: what it does that no part of a tensor can do alone."""

_OF_ITS_OWN: dict[type[Optimizer], str] = {
    torch.optim.SparseAdam: "it is for sparse gradients, which cannot live in chunks",
}
"""Element-wise otherwise, but a chunk has no place for what they keep."""


def accepted(optimizer: Optimizer | Sequence[Optimizer]) -> ManagedOptimizer:
    """What an optimizer is, or becomes, under management; several become one.

    Raises
    ------
    TypeError
        If its arithmetic is of no known kind; says why that matters.
    ValueError
        If it has an option with which it cannot be managed.
    """
    if isinstance(optimizer, ManagedOptimizer):
        return optimizer
    if not isinstance(optimizer, Optimizer):
        return JointOptimizer([accepted(each) for each in optimizer])
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        kind = elementwise.asks_for_torchs_own(optimizer)
        if kind is None:
            return HybridAdam.from_torch(optimizer)  # type: ignore[arg-type]
    else:
        kind = elementwise.kind_of(optimizer)
    if kind is not None:
        return ElementwiseOptimizer(kind, optimizer)
    known = ", ".join(("HybridAdam", "torch.optim.Adam", "AdamW", *elementwise.names()))
    raise TypeError(f"optimizer must be one of {known}; {_why_not(optimizer)}")


@contextmanager
def unchanged_on_failure(optimizer: Optimizer | Sequence[Optimizer] | None) -> Iterator[None]:
    """Where the body raises, the optimizer has the states and the groups that it came with.

    What `accepted` makes takes over both, and what comes after it may find that the model does not fit.
    """
    if optimizer is None:
        yield
        return
    if not isinstance(optimizer, Optimizer):
        with ExitStack() as until_known:
            for each in optimizer:
                until_known.enter_context(unchanged_on_failure(each))
            yield
        return
    states = dict(optimizer.state)
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    try:
        yield
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(states)
        for group, before in groups:
            group.clear()
            group.update(before)
        raise


def rule_name(optimizer: Optimizer) -> str | None:
    """What checkpoints call the arithmetic of an optimizer, boosted or not; None if it is of no known kind."""
    if isinstance(optimizer, ManagedOptimizer):
        return optimizer.rules.name
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return ADAM.name
    kind = elementwise.kind_of(optimizer)
    return None if kind is None else kind.name


def known_rules(optimizer: Optimizer) -> Rules | None:
    """The arithmetic of an optimizer, boosted or not; None if it is of no known kind."""
    if isinstance(optimizer, ManagedOptimizer):
        return optimizer.rules
    kind = elementwise.kind_of(optimizer) or elementwise.adam_kind(optimizer)
    return None if kind is None else OneRule(rule_of(kind, optimizer))


def _why_not(optimizer: Optimizer) -> str:
    name = type(optimizer).__name__
    if isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        return (
            f"got {name} around {type(inner).__name__}: boost the model with its optimizer first, and wrap what comes "
            "back (accelerator.prepare, ...)"
        )
    for cls in type(optimizer).__mro__:
        does = _WHOLE_TENSOR.get(cls.__name__.lower())
        if does is not None:
            return (
                f"got {name}: it {does}, and states in chunks are updated in pieces, wherever each piece is. "
                f"If it looks at one parameter at a time, call gemini.nn.optimizer.register_whole_parameter({name}, "
                "[its states]); else train it unmanaged, or use HybridAdam"
            )
    if type(optimizer) in _OF_ITS_OWN:
        return f"got {name}: {_OF_ITS_OWN[type(optimizer)]}. Train it unmanaged, or use HybridAdam"
    register = f"gemini.nn.optimizer.register_elementwise({name}, [its states])"
    if type(optimizer).__mro__[1] is not Optimizer:
        return (
            f"got {name}, a subclass, which may compute something else; give the optimizer itself, or, if it is "
            f"element-wise, call {register}"
        )
    return f"got {name}, which is not known to be element-wise; if it is, call {register}, else train it unmanaged"
