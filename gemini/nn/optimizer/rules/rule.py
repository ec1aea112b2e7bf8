"""The rule protocol: an optimizer's arithmetic, and the states that its manager keeps for it.

Most rules are element-wise: what happens to an element depends on this element's values and on numbers that are the
same for all, so any cut of a flat buffer into pieces gives the same bits, and pieces may lie anywhere. The others are
whole: a step of theirs gets all elements of one parameter at once, and its shape.

What they keep has one value for each element, and has a place in the chunk (a slot), or it is small and stays in RAM by
itself: **side states**, such as a number for each parameter, or the rows and columns of Adafactor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gemini.chunk import BufferSpec, Codec

from .option_ranges import brief, number_of

__all__ = [
    "BoundUpdate",
    "BoundSideUpdate",
    "Form",
    "Rule",
    "BoundSplitUpdate",
    "BufferSpec",
    "BoundRule",
    "counted",
    "has_state",
    "steps_of",
    "whole_steps",
]

_LIMIT_STEPS = 2**53
"""From here on a float64 does not count by one."""


class BoundUpdate(Protocol):
    """One step of a rule with all its numbers: it may be done later, whatever becomes of the options since."""

    def apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, out: Tensor | None = None) -> None:
        """Do one step in place on flat buffers of equal length.

        Parameters
        ----------
        param
            float32, one-dimensional, contiguous. Written.
        states
            The rule's states, likewise, of the dtypes that its slots say. Written.
        grad
            The gradient, float32, bfloat16 or float16. Not changed.
        out
            Receives the new ``param`` rounded to its dtype.

        Raises
        ------
        Exception
            On any exception nothing has been written, if there were at most `atomic_numel` elements.
        """

    def atomic_numel(self, device: torch.device) -> int | None:
        """Elements up to which `apply` writes all or nothing when it raises; None: any number."""


@runtime_checkable
class BoundSplitUpdate(BoundUpdate, Protocol):
    """A step that knows masters in two halves: of rules with a slot that ``has_spare_sign``."""

    def apply_split(self, high: Tensor, low: Tensor, states: Sequence[Tensor], grad: Tensor) -> None:
        """As `apply` on the masters that these are the halves of. See [Note: Split master]."""


class BoundSideUpdate(BoundUpdate, Protocol):
    """A step of an element-wise rule with side states, which are numbers that do not depend on elements."""

    def side_after(self) -> Mapping[str, Tensor]:
        """The side states after the step."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a parameter is beside its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    side: dict[str, Tensor] = field(default_factory=dict)
    """Its side states; empty before its first step. A step of a whole rule replaces what is in it."""


class BoundRule(Protocol):
    """Makes the steps of a group."""

    def __call__(
        self, step: int, grad_scale: float, is_fresh: bool | None = None, form: Form | None = None, /
    ) -> BoundUpdate:
        """A step of parameters.

        Parameters
        ----------
        step
            Its number, 1 for a parameter's first.
        grad_scale
            A factor for the gradient.
        is_fresh
            Whether the parameters have no state yet. None: they have none in their first step. They may have one then,
            too: whose count of steps somebody has set to 0.
        form
            Of the parameter, for a rule that is whole or has side states.
        """


class Rule(Protocol):
    """An optimizer's arithmetic, and what its state dict looks like."""

    name: str
    """The torch optimizer that it stands for; checkpoints and messages have it."""
    takes_step: bool
    """Whether the state of a parameter has a ``step``, the number of steps that it has taken."""
    has_initial_state: bool
    """Whether a parameter has states before its first step."""
    is_whole: bool
    """Whether a step needs all elements of a parameter at once; else any piece of them will do."""
    kept_in_group: tuple[str, ...]
    """What it changes in a group in each step: nothing, or a ``step`` that counts those of the group."""

    def slots(self, group: Mapping[str, Any]) -> tuple[BufferSpec, ...]:
        """What it keeps for each element of the parameters of a group."""

    def codecs(self, slots: Sequence[BufferSpec]) -> Mapping[str, Codec]:
        """How the states that state dicts and checkpoints have lie in these slots, by their names there."""

    def keeps_state(self, group: Mapping[str, Any]) -> bool:
        """Whether a step with these options leaves a state behind. Plain SGD's does not."""

    def side(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """The side states of a parameter of this shape, by name, and their shapes."""

    def counted(self, steps: int) -> Any:
        """A number of steps as the state has it: a scalar tensor on the CPU, or an int."""

    def after_step(self, param_groups: Sequence[Any]) -> None:
        """Change in the groups what a step changes there."""

    def initial(self, name: str) -> float:
        """What the elements of this state are before a parameter's first step."""

    def bind(self, group: Mapping[str, Any], slots: Sequence[BufferSpec]) -> BoundRule:
        """The steps with the options that the group has now, on states that are these slots.

        Raises
        ------
        ValueError
            If an option is out of range, or needs a state that is not among the slots.
        """

    def refuse(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group (a saved one, say) switches on an option that is not supported."""


def has_state(saved: Mapping[str, Any]) -> bool:
    """Whether there is anything in a state, as a state dict has it: entries may be None, and a master alone is none."""
    return any(value is not None for name, value in saved.items() if name != "master")


def whole_steps(value: Any) -> int:
    """A count of steps from a number or a scalar tensor.

    Raises
    ------
    ValueError
        If it is no count.
    """
    number = number_of(value)
    if number is None or not 0 <= number < _LIMIT_STEPS or number != int(number):
        raise ValueError(
            f"step counts the steps of a parameter, below 2**53: a whole number of 0 or more, got {brief(value)}"
        )
    return int(number)


def counted(steps: int) -> Tensor:
    """A number of steps as torch's optimizers have it."""
    return torch.tensor(float(steps), dtype=torch.float32, device="cpu")


def steps_of(rule: Rule, saved: Mapping[str, Any]) -> int:
    """How many steps a state, as a state dict has it, is old; where it does not say, 1 if there is any."""
    if rule.takes_step:
        return whole_steps(saved.get("step", 0))
    return int(has_state(saved))
