"""What is to be known of an optimizer, boosted or not, by those who save and load it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from gemini.nn.optimizer.managed import ManagedOptimizer
from gemini.step.managed_step import ChunkedStep
from gemini.updates.scaler import LossScaler


def managed(optimizer: Optimizer) -> ChunkedStep | None:
    """The step of a boosted optimizer; None of one that is not boosted."""
    step = getattr(optimizer, "_managed", None)
    return step if isinstance(step, ChunkedStep) else None


def loss_scaler(optimizer: Optimizer) -> LossScaler | None:
    """Its loss scale; None where there is none."""
    step = managed(optimizer)
    return step.scaling.scaler if step is not None else None


def names_of(optimizer: ManagedOptimizer, group: Mapping[str, Any]) -> Sequence[str | None]:
    """The full names in the model of a group's parameters; None where nobody knows them."""
    step = managed(optimizer)
    given: Sequence[str | None] = group.get("param_names") or [None] * len(group["params"])
    if step is None:
        return list(given)
    known = (step.manager.slot(p).name if step.manager.find(p) is not None else None for p in group["params"])
    return [name or other for name, other in zip(known, given, strict=True)]
