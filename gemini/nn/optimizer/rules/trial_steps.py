"""What is asked of every optimizer whose own ``step`` is tried when it is boosted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .elementwise_rule import ElementwiseRule


def refuse_changes(rule: ElementwiseRule, changed: Sequence[str]) -> None:
    """Raise ``ValueError`` if a step has replaced options or attributes.

    torch's own keep notes there of what they have checked.
    """
    if changed and not rule.kind.cls.__module__.startswith("torch."):
        raise ValueError(
            f"{rule.name} changes {', '.join(changed)} of its group or of itself in a step; only a step count and the "
            "states that it is registered with can be kept from step to step"
        )


def refuse_drawing(rule: ElementwiseRule, before: Tensor) -> None:
    """Raise ``ValueError`` if random numbers were drawn since a state of the generator, and put that back."""
    if not torch.equal(torch.random.get_rng_state(), before):
        torch.random.set_rng_state(before)
        raise ValueError(f"{rule.name} draws random numbers, which come in another order where chunks are updated")
