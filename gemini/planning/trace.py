"""What one step did: the moments of the clock. Pure: no torch."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Phase(Enum):
    """Which side of a step a moment belongs to."""

    __hash__ = object.__hash__  # moments are looked up at each visit, and Enum's own is written in Python

    FORWARD = "forward"
    """Also a recomputation in backward: the unit's forward runs."""
    BACKWARD = "backward"


class Moment(NamedTuple):
    """A unit enters."""

    unit: int
    phase: Phase
    in_use: frozenset[int]
    """Chunks pinned from here on: this unit's and those of every visit still open."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The moments of one cycle (a forward, and its backward when training), in order."""

    moments: tuple[Moment, ...]

    def first_uses(self) -> tuple[int, ...]:
        """Chunks in the order in which they are first needed."""
        return tuple(dict.fromkeys(c for moment in self.moments for c in sorted(moment.in_use)))
