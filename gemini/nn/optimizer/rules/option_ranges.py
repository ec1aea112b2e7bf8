"""What the options of a parameter group may be: the checks of torch's constructors, as tables.

Constructors look at options once, and ``load_state_dict`` of torch not at all, so that a NaN from a file is found when
every step has failed. The tables say it once for both. They are stricter than torch in that numbers are finite, and
less strict where training goes on beyond what a constructor takes: a schedule may bring ``lr`` below 0.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor


class Option(Protocol):
    """The values that one option may have."""

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence that begins with the option's name; None for nothing."""


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number, or a tensor that holds one."""

    low: float = -math.inf
    high: float = math.inf
    has_low: bool = True
    """Whether ``low`` itself is allowed."""
    has_high: bool = False

    def fault(self, value: Any) -> str | None:
        number = float(value) if isinstance(value, bool) else number_of(value)  # torch computes with flags, too
        if number is None:
            return f"must be a number, got {brief(value)}"
        if math.isfinite(number) and self._is_above(number) and self._is_below(number):
            return None
        return f"must be {self._words()}, got {brief(value)}"

    def _is_above(self, number: float) -> bool:
        return number >= self.low if self.has_low else number > self.low

    def _is_below(self, number: float) -> bool:
        return number <= self.high if self.has_high else number < self.high

    def _words(self) -> str:
        if self.high < math.inf:
            opening, closing = "[" if self.has_low else "(", "]" if self.has_high else ")"
            return f"in {opening}{self.low:g}, {self.high:g}{closing}"
        if self.low == -math.inf:
            return "finite"
        return f"finite and {'at least' if self.has_low else 'above'} {self.low:g}"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two numbers, each with its own range."""

    first: Number
    second: Number

    def fault(self, value: Any) -> str | None:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 2:
            return f"must be a pair of numbers, got {brief(value)}"
        for place, (number, item) in enumerate(zip((self.first, self.second), value, strict=True)):
            if fault := number.fault(item):
                return f"at index {place} {fault}"
        return None


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False, also as 1 or 0."""

    or_none: bool = False

    def fault(self, value: Any) -> str | None:
        if (self.or_none and value is None) or (isinstance(value, int) and value in (0, 1)):
            return None
        return f"must be True{', None' if self.or_none else ''} or False, got {brief(value)}"


@dataclass(frozen=True, slots=True)
class Like:
    """A value of the same kind as another one: of options that no table has."""

    example: Any

    def fault(self, value: Any) -> str | None:
        example = self.example
        if isinstance(example, bool):
            return Flag().fault(value)
        if (number := number_of(example)) is not None:
            return None if math.isinf(number) and number_of(value) == number else Number().fault(value)
        if isinstance(example, tuple | list):
            if not isinstance(value, tuple | list) or len(value) != len(example):
                return f"must have {len(example)} values, got {brief(value)}"
            faults = (Like(mine).fault(theirs) for mine, theirs in zip(example, value, strict=True))
            return next((fault for fault in faults if fault), None)
        if example is not None and not isinstance(value, type(example)):
            return f"must be a {type(example).__name__}, got {brief(value)}"
        return None


AT_LEAST_0 = Number(0.0)
BELOW_1 = Number(0.0, 1.0)
_ANY = Number()
_FLAG, _FLAG_OR_NONE = Flag(), Flag(or_none=True)
_BETAS = Pair(BELOW_1, BELOW_1)

_ALL: Mapping[str, Option] = {
    "lr": _ANY,
    "weight_decay": _ANY,
    "maximize": _FLAG,
    "foreach": _FLAG_OR_NONE,
    "fused": _FLAG_OR_NONE,
    "capturable": _FLAG,
    "differentiable": _FLAG,
    # Schedulers keep these in the groups.
    "initial_lr": _ANY,
    "max_lr": _ANY,
    "min_lr": _ANY,
    "base_momentum": _ANY,
    "max_momentum": _ANY,
}

_OWN: Mapping[str, Mapping[str, Option]] = {
    "Adam": {
        "betas": _BETAS,
        "eps": AT_LEAST_0,
        "amsgrad": _FLAG,
        "decoupled_weight_decay": _FLAG,
        "adamw_mode": _FLAG,
        "bias_correction": _FLAG,
    },
    "SGD": {"momentum": AT_LEAST_0, "dampening": _ANY, "nesterov": _FLAG},
    "Adagrad": {"lr_decay": AT_LEAST_0, "eps": AT_LEAST_0, "initial_accumulator_value": AT_LEAST_0},
    "RMSprop": {"alpha": AT_LEAST_0, "eps": AT_LEAST_0, "momentum": AT_LEAST_0, "centered": _FLAG},
    "Adadelta": {"rho": Number(0.0, 1.0, has_high=True), "eps": AT_LEAST_0},
    "Adamax": {"betas": _BETAS, "eps": AT_LEAST_0},
    "RAdam": {"betas": _BETAS, "eps": AT_LEAST_0, "decoupled_weight_decay": _FLAG},
    "Rprop": {
        "etas": Pair(Number(0.0, 1.0, has_low=False), Number(1.0, has_low=False)),
        "step_sizes": Pair(AT_LEAST_0, AT_LEAST_0),
    },
}


def group_faults(rule: str | None, present: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What is wrong with the options of a saved group; each begins with the option's name.

    Parameters
    ----------
    rule
        The optimizer's name in checkpoints; None if it is of no known kind. Of one that is not torch's only the kinds
        of values are known.
    present
        The group that takes the options over; those that no table has are to be of the kind that it has.
    saved
        Options that neither the tables nor ``present`` have are somebody's notes, and may be anything.
    """
    unknown = {} if present.get("lr", 0.0) is None else {"lr": _ANY}  # None: the optimizer makes its own
    table = {**_ALL, **_OWN[rule]} if rule is not None and rule in _OWN else unknown
    faults = []
    for name, value in saved.items():
        if name in ("params", "param_names"):
            continue
        option = table.get(name) or (Like(present[name]) if name in present else None)
        if option is not None and (fault := option.fault(value)):
            faults.append(f"{name} {fault}")
    return faults


def number_of(value: Any) -> float | None:
    """A real number, or the one in a tensor, as a float; None for everything else, and infinite where it is too large.

    Flags are no numbers.
    """
    if isinstance(value, Tensor):
        is_readable = value.numel() == 1 and value.layout == torch.strided and not value.is_meta
        if not is_readable or value.is_quantized or value.is_complex() or value.dtype == torch.bool:
            return None
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def brief(value: Any) -> str:
    """A value as a short text, however large it is; of a tensor what it is."""
    if isinstance(value, Tensor):
        number = number_of(value)
        return f"a tensor of {value.dtype} and shape {_shape(value)}" if number is None else f"{number:g}"
    if isinstance(value, int) and abs(value) > 1 << 100:  # Python refuses to print longer ones
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)


def _shape(value: Tensor) -> str:
    return "that is nested" if value.is_nested else str(tuple(value.shape))
