"""Adam as a rule: two moments, and the kernel of the buffers' device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arithmetic import AdamHyper, AdamScalars, scalars
from .group_options import refuse_options
from .rule import StateSlot, StepMaker
from .update import adam_update, atomic_numel

_MOMENTS = (StateSlot("exp_avg"), StateSlot("exp_avg_sq"))


@dataclass(frozen=True, slots=True)
class AdamAtStep:
    """One step of Adam (an `AtStep`)."""

    scalars: AdamScalars

    def apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, out: Tensor | None = None) -> None:
        exp_avg, exp_avg_sq = states
        adam_update(param, exp_avg, exp_avg_sq, grad, self.scalars, out)

    def atomic_numel(self, device: torch.device) -> int | None:
        return atomic_numel(device)


class AdamRule:
    """Adam and AdamW (a `Rule`)."""

    name = "Adam"
    takes_step = True
    starts_filled = False

    def slots(self, group: Mapping[str, Any]) -> tuple[StateSlot, ...]:
        return _MOMENTS

    def of_group(self, group: Mapping[str, Any], slots: Sequence[StateSlot]) -> StepMaker:
        return partial(_at_step, AdamHyper.of_group(group))

    def remembers(self, group: Mapping[str, Any]) -> bool:
        return True

    def initial(self, name: str) -> float:
        return 0.0

    def refuse(self, group: Mapping[str, Any]) -> None:
        refuse_options(group)


ADAM = AdamRule()


def _at_step(hyper: AdamHyper, step: int, grad_scale: float) -> AdamAtStep:
    return AdamAtStep(scalars(hyper, step, grad_scale))
