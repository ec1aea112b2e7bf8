"""The rules for arguments that are no places: flags, numbers, words, sizes, objects."""

import math
import operator
from dataclasses import dataclass
from numbers import Real as RealNumber
from typing import Any

from gemini.sizes import ACCEPTED, parse_bytes

from .checked import NotAllowed, Rule

LARGEST = 2**63 - 1
"""What the system and torch count with."""


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False, also as 1 or 0, or one of numpy."""

    allowed = "True or False"

    def meant(self, value: Any) -> bool:
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
            return bool(value)
        raise NotAllowed(ValueError if isinstance(value, int) else TypeError)


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer of any kind; flags are none."""

    low: int = 0
    high: int = LARGEST

    @property
    def allowed(self) -> str:
        most = "" if self.high == LARGEST else f" and at most {self.high}"
        return f"a whole number of {self.low} or more{most}"

    def meant(self, value: Any) -> int:
        if isinstance(value, bool):
            raise NotAllowed(TypeError)
        try:
            number = operator.index(value)
        except TypeError:
            raise NotAllowed(TypeError) from None
        if not self.low <= number <= self.high:
            raise NotAllowed(ValueError, ", which is too large" if number > LARGEST else "")
        return number


@dataclass(frozen=True, slots=True)
class Real:
    """A finite number of any kind; flags are none."""

    low: float = -math.inf
    high: float = math.inf
    has_low: bool = True
    """Whether ``low`` itself is allowed."""
    has_high: bool = True
    is_finite: bool = True

    @property
    def allowed(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'at least' if self.has_low else 'above'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'at most' if self.has_high else 'below'} {self.high:g}")
        return " ".join(("a finite number" if self.is_finite else "a number", " and ".join(parts))).rstrip()

    def meant(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, RealNumber):
            raise NotAllowed(TypeError)
        try:
            number = float(value)
        except OverflowError:
            raise NotAllowed(ValueError) from None
        is_above = number >= self.low if self.has_low else number > self.low
        is_below = number <= self.high if self.has_high else number < self.high
        if not (is_above and is_below and (math.isfinite(number) or not self.is_finite)):
            raise NotAllowed(ValueError)
        return number


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]
    old: tuple[str, ...] = ()
    """Words that are taken and not recommended."""

    @property
    def allowed(self) -> str:
        *most, last = map(repr, self.words)
        return f"{', '.join(most)} or {last}" if most else last

    def meant(self, value: Any) -> str:
        if not isinstance(value, str):
            raise NotAllowed(TypeError)
        if value not in (*self.words, *self.old):
            raise NotAllowed(ValueError)
        return str(value)


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes, as a number or a text."""

    low: int = 1

    @property
    def allowed(self) -> str:
        return f"{ACCEPTED}, {'more than 0' if self.low else '0 or more'}"

    def meant(self, value: Any) -> int:
        try:
            nbytes = parse_bytes(value)
        except (ValueError, TypeError) as error:
            raise NotAllowed(TypeError if isinstance(error, TypeError) else ValueError) from None
        if nbytes < self.low:
            raise NotAllowed(ValueError)
        return nbytes


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of some class."""

    kinds: tuple[type, ...]
    allowed: str

    def meant(self, value: Any) -> Any:
        if not isinstance(value, self.kinds):
            raise NotAllowed(TypeError)
        return value


@dataclass(frozen=True, slots=True)
class Has:
    """An object with some attributes, whatever its class."""

    attributes: tuple[str, ...]
    allowed: str

    def meant(self, value: Any) -> Any:
        if isinstance(value, type) or not all(hasattr(value, name) for name in self.attributes):
            raise NotAllowed(TypeError)
        return value


@dataclass(frozen=True, slots=True)
class OrNone:
    """None, or what another rule allows."""

    rule: Rule

    @property
    def allowed(self) -> str:
        return f"None or {self.rule.allowed}"

    def meant(self, value: Any) -> Any:
        return None if value is None else self.rule.meant(value)


@dataclass(frozen=True, slots=True)
class Unchecked:
    """Anything: the function or what it calls finds out what it got, and names it."""

    why: str
    allowed = "anything"

    def meant(self, value: Any) -> Any:
        return value
