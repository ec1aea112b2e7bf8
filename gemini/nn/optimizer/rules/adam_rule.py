"""Adam as a rule: two moments, and the kernel of the buffers' device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemini.chunk import Codec

from ..kernels.arithmetic import AdamHyper, AdamScalars, scalars
from ..kernels.forms import SPLIT
from ..kernels.update import adam_update, atomic_numel
from . import moments
from .group_options import refuse_options
from .rule import BoundRule, BufferSpec, Form, counted


@dataclass(frozen=True, slots=True)
class AdamUpdate:
    """One step of Adam (a `BoundUpdate`, and with float32 states a `BoundSplitUpdate`)."""

    states: str
    """How the moments are kept."""
    scalars: AdamScalars

    def apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, out: Tensor | None = None) -> None:
        adam_update(self.states, (param, *states), grad, self.scalars, out)

    def apply_split(self, high: Tensor, low: Tensor, states: Sequence[Tensor], grad: Tensor) -> None:
        adam_update(SPLIT, (high, low, *states), grad, self.scalars)

    def atomic_numel(self, device: torch.device) -> int | None:
        return atomic_numel(device)


class AdamRule:
    """Adam and AdamW (a `Rule`).

    Parameters
    ----------
    states
        How the moments are kept: ``"fp32"``, ``"bf16"`` or ``"8bit"``.
    """

    name = "Adam"
    takes_step = True
    has_initial_state = False
    is_whole = False
    kept_in_group: tuple[str, ...] = ()

    def __init__(self, states: str = "fp32") -> None:
        self.states = states
        self._slots = moments.slots(states)

    def slots(self, group: Mapping[str, Any]) -> tuple[BufferSpec, ...]:
        return self._slots

    def codecs(self, slots: Sequence[BufferSpec]) -> Mapping[str, Codec]:
        return moments.CODECS[self.states]

    def bind(self, group: Mapping[str, Any], slots: Sequence[BufferSpec]) -> BoundRule:
        return partial(_at_step, self.states, AdamHyper.of_group(group))

    def keeps_state(self, group: Mapping[str, Any]) -> bool:
        return True

    def side(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        return {}

    def counted(self, steps: int) -> Any:
        return counted(steps)

    def after_step(self, param_groups: Sequence[Any]) -> None:
        pass

    def initial(self, name: str) -> float:
        return 0.0

    def refuse(self, group: Mapping[str, Any]) -> None:
        refuse_options(group)


ADAM = AdamRule()


def _at_step(
    states: str,
    hyper: AdamHyper,
    step: int,
    grad_scale: float,
    is_fresh: bool | None = None,
    form: Form | None = None,
) -> AdamUpdate:
    return AdamUpdate(states, scalars(hyper, step, grad_scale))
