"""A boosted model's part of a budget. All numbers are bytes of model data, by memory (host, device, disk)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol
from weakref import ReferenceType

from gemini.lease.sharing import Claim


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What a model has of one memory."""

    claim: Claim
    """What it asks for."""
    capacity: int
    """What it may take now."""
    used: int
    """What it has taken."""
    least: int
    """What stays with it while it does nothing: its homes, and room for the full copies of one moment."""


class Occupant(Protocol):
    """A boosted model, as its budget sees it."""

    @property
    def is_idle(self) -> bool:
        """Nothing of it runs, and what it has may be moved."""

    @property
    def non_model_bytes(self) -> int:
        """The peak of activations and the like, as far as it was measured."""

    def uses(self) -> Mapping[str, Use]:
        """What it has, by memory."""

    def cut(self, memory: str, nbytes: int) -> int:
        """Take at most ``nbytes`` from now on, as far as full copies that nothing uses make room; what it is now."""

    def grow(self, memory: str, nbytes: int) -> None:
        """Take up to ``nbytes`` from now on, for full copies."""

    def resize(self, nbytes: Mapping[str, int]) -> None:
        """Take these from now on, and move homes as that asks for.

        Raises
        ------
        MemoryError, RuntimeError, OSError
            If that is impossible; nothing has been changed.
        """


class Seat:
    """The place of one model in a budget, from before it is built.

    Parameters
    ----------
    claims
        What it will ask for, as far as that is known before it is built.
    said
        What its user has said that it is to have; nobody takes of that.
    """

    def __init__(self, claims: Mapping[str, Claim], said: Mapping[str, int]) -> None:
        self.shares: dict[str, int] = dict(said)
        """What it was given for good; full copies may borrow more from idle neighbours."""
        self.turn = 0
        """When it last had something to do."""
        self._claims = dict(claims)
        self._said = dict(said)
        self._floors: dict[str, int] = {}
        """Below what it was seen not to go."""
        self._occupant: ReferenceType[Occupant] | None = None

    def occupy(self, occupant: "ReferenceType[Occupant]") -> None:
        """The model is built. It is not kept alive from here."""
        self._occupant = occupant

    @property
    def occupant(self) -> Occupant | None:
        return None if self._occupant is None else self._occupant()

    @property
    def is_left(self) -> bool:
        """True if there was a model, and it is gone."""
        return self._occupant is not None and self._occupant() is None

    def say(self, nbytes: Mapping[str, int]) -> None:
        """Its user has said what it is to have."""
        self._said.update(nbytes)
        self.shares.update(nbytes)

    def give(self, memory: str, nbytes: int) -> None:
        """It has this much for good now."""
        self.shares[memory] = nbytes

    def begin(self, turn: int) -> None:
        """It has something to do."""
        self.turn = turn

    def cannot_go_below(self, memory: str, nbytes: int) -> None:
        """It could not be brought below this."""
        self._floors[memory] = nbytes

    def is_said(self, memory: str) -> bool:
        """True if its user has said what it is to have."""
        return memory in self._said

    def uses(self) -> dict[str, Use]:
        """What it has and asks for, by memory."""
        occupant = self.occupant
        if occupant is None:
            found = {
                memory: Use(claim=claim, capacity=self.shares.get(memory, 0), used=0, least=0)
                for memory, claim in self._claims.items()
            }
        else:
            found = dict(occupant.uses())
        return {memory: self._with_what_is_known(memory, use) for memory, use in found.items()}

    def _with_what_is_known(self, memory: str, use: Use) -> Use:
        if memory in self._said:
            claim = Claim(floor=self._said[memory], wish=self._said[memory])
        else:
            floor = max(use.claim.floor, self._floors.get(memory, 0))
            claim = Claim(floor=floor, wish=max(floor, use.claim.wish))
        return Use(claim=claim, capacity=use.capacity, used=use.used, least=use.least)
