"""`Budget`: memory that several boosted models share, and what they leave each other."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from gemini.arguments.checked import checked
from gemini.arguments.rules import OrNone, Size
from gemini.lease.asked import Asked
from gemini.lease.holder import LimitsOf
from gemini.lease.part import MachinePart, Wants
from gemini.lease.seat import Seat, Use
from gemini.lease.sharing import Claim, share
from gemini.lease.standing import DEVICE, DISK, HOST, Answer
from gemini.sizes import format_bytes

_CHANGE_RATIO = 0.02
"""A share that differs by less stays as it is."""


class Budget:
    """Memory that several boosted models share: ``GeminiPlugin(budget=budget)`` for each of them.

    As those of reinforcement learning do (actor, critic, reference and reward models), or teacher and student. Each has
    a share for its homes, by what it can make use of; what idle models keep beyond their homes is lent to the one that
    runs, and when a model is boosted the homes of others make room: to disk, where there is an ``offload_dir``.
    Numbers are those of each model alone.

    Models that are boosted without a budget share one of their process, which takes what the machine has, together with
    other runs on it (see ``gemini-stat lease``).

    Parameters
    ----------
    host_memory, device_memory, disk_memory
        Bytes of model data of all of them per tier, as a number or ``"24GiB"``; None finds out, and shares with other
        runs.

    Raises
    ------
    ValueError, TypeError
        If a size is none.
    """

    @checked(dict.fromkeys(("host_memory", "device_memory", "disk_memory"), OrNone(Size())))
    def __init__(
        self,
        *,
        host_memory: int | str | None = None,
        device_memory: int | str | None = None,
        disk_memory: int | str | None = None,
    ) -> None:
        self._said = said_sizes({HOST: host_memory, DEVICE: device_memory, DISK: disk_memory})
        self._asked: dict[str, int] = {}
        """What was asked of the models that are there; it counts before what was said."""
        self._seats: list[Seat] = []
        self._part: MachinePart | None = None
        self._found: dict[str, int | None] = {}
        """What there is for all of them by the last look; None where it is as much as they can use."""
        self._turn = 0
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        said = ", ".join(f"{memory}_memory={format_bytes(nbytes)!r}" for memory, nbytes in self._said.items())
        return f"Budget({said})"

    @property
    def said(self) -> Mapping[str, int]:
        """The bytes that its user has said, by memory."""
        return {**self._said, **self._asked}

    # -- a model comes and goes

    def join(
        self,
        seat: Seat,
        measured: Callable[[], Mapping[str, int]],
        limits: Mapping[str, LimitsOf],
        part: Callable[[], MachinePart],
    ) -> dict[str, int]:
        """Make room for one more model; the capacities that it has, by memory.

        Parameters
        ----------
        measured
            What is free of each memory for model data.
        limits
            By memory, what bounds it on this machine.
        part
            Makes the budget's part of the machine when its first model comes.
        """
        with self._lock:
            if self._part is None:
                self._part = part()
            self._part.watch(limits)
            self._seats = [each for each in self._seats if not each.is_left]
            self._seats.append(seat)
            self._part.say(self._wants(), is_waiting=True)
            for memory, use in seat.uses().items():
                if not seat.is_said(memory):
                    seat.give(memory, self._room_for(seat, memory, use, measured))
            self._part.say(self._wants())
            return dict(seat.shares)

    def settled(self) -> None:
        """A model is built, or changed: others hear of what it has."""
        with self._lock:
            if self._part is not None:
                self._part.say(self._wants())

    def leave(self, seat: Seat) -> None:
        """A model is gone, or could not be built. Idempotent."""
        with self._lock:
            self._seats = [each for each in self._seats if each is not seat and not each.is_left]
            if self._part is not None and self._seats:
                self._part.say(self._wants())
            elif self._part is not None:
                self._part.end()
                self._part = None
                self._found, self._asked = {}, {}

    def _room_for(self, seat: Seat, memory: str, use: Use, measured: Callable[[], Mapping[str, int]]) -> int:
        others = [each for each in self._seats if each is not seat and memory in each.uses()]
        total = self.said.get(memory)
        if total is None:
            assert self._part is not None, "the part is there from the first model on"
            granted = self._part.begin(memory, self._wants()[memory])
            total = min(granted, measured()[memory] + sum(each.uses()[memory].used for each in others))
        if total - sum(_held(each.uses()[memory]) for each in others) < use.claim.wish:
            targets = self._divide(memory, total)
            for each in others:
                if not each.is_said(memory):
                    self._shrink(each, memory, targets[each])
        if memory in self.said:
            for each in others:
                self._trim(each, memory)
        return max(0, total - sum(_held(each.uses()[memory]) for each in others))

    def _trim(self, seat: Seat, memory: str) -> None:
        """Take from an idle model what it cannot make use of, so that all together stay within what was said."""
        occupant = seat.occupant
        if occupant is not None and occupant.is_idle and not seat.is_said(memory):
            seat.give(memory, occupant.cut(memory, _held(occupant.uses()[memory])))

    def _end_loans(self, seat: Seat) -> None:
        """Have an idle model give back what it has borrowed: shares are about to change."""
        occupant = seat.occupant
        if occupant is None or not occupant.is_idle or len(self._seats) < 2:
            return
        for memory, use in seat.uses().items():
            if memory in self.said and use.capacity > seat.shares.get(memory, use.capacity):
                occupant.cut(memory, seat.shares[memory])

    def _shrink(self, seat: Seat, memory: str, nbytes: int) -> None:
        """Bring an idle model down to its share: full copies first, then homes."""
        occupant = seat.occupant
        if occupant is None or not occupant.is_idle:
            return  # it follows by itself, at its next step
        if _held(occupant.uses()[memory]) <= nbytes:
            return
        if occupant.cut(memory, nbytes) > nbytes:
            try:
                occupant.resize({memory: nbytes})
            except (MemoryError, RuntimeError, OSError):
                seat.cannot_go_below(memory, occupant.uses()[memory].capacity)
        seat.give(memory, occupant.uses()[memory].capacity)

    # -- while they train

    @property
    def is_due(self) -> bool:
        """True if it is time to look at the machine again."""
        return self._part is not None and time.monotonic() >= self._part.next_look  # asked at each visit

    def look(self, seat: Seat) -> None:
        """See what there is for all of them now, on behalf of one; others that are idle give back what they have to."""
        with self._lock:
            if self._part is not None:
                self._found = self._part.look(self._wants())
            for other in self._seats:
                if other is not seat:
                    self._end_loans(other)
                    for memory, nbytes in self.targets(other).items():
                        self._shrink(other, memory, nbytes)

    def targets(self, seat: Seat) -> dict[str, int]:
        """The capacities that a model is to have, where they are others than its share of before."""
        with self._lock:
            found = {}
            for memory, use in seat.uses().items():
                is_bound = memory in self.said or memory in self._found
                if seat.is_said(memory) or not is_bound:
                    continue
                total = self.said.get(memory, self._found.get(memory))
                wanted = use.claim.wish if total is None else self._divide(memory, total)[seat]
                has = min(seat.shares.get(memory, use.capacity), use.claim.wish)
                if abs(wanted - has) > has * _CHANGE_RATIO:
                    found[memory] = wanted
            return found

    def resized(self, seat: Seat, nbytes: Mapping[str, int]) -> None:
        """A model has these capacities now."""
        for memory, each in nbytes.items():
            seat.give(memory, each)
        self.settled()

    def refused(self, seat: Seat, nbytes: Mapping[str, int]) -> None:
        """A model could not be brought to these capacities: it needs more."""
        uses = seat.uses()
        for memory, each in nbytes.items():
            if each < uses[memory].capacity:
                seat.cannot_go_below(memory, min(uses[memory].capacity, uses[memory].claim.wish))
        self.settled()

    def take_asked(self) -> Asked | None:
        """What a user asks of this budget, once."""
        return None if self._part is None else self._part.take_asked()

    def answer(self, asked: Asked, is_done: bool, text: str) -> None:
        """Say what became of it."""
        with self._lock:
            if self._part is not None:
                self._part.say(self._wants(), answer=Answer(asked.id, is_done, text))

    def ask(self, nbytes: Mapping[str, int]) -> dict[str, int]:
        """Have all of them take this much together from now on; what was asked before, by memory."""
        with self._lock:
            before, self._asked = self._asked, {**self._asked, **nbytes}
            return before

    def ask_again(self, before: Mapping[str, int]) -> None:
        """It could not be done: have them take what was asked before."""
        with self._lock:
            self._asked = dict(before)

    def begin(self, seat: Seat, may_borrow: bool = True) -> bool:
        """A model begins to run: borrow for its full copies what idle ones keep beyond their homes.

        Parameters
        ----------
        may_borrow
            False where its model data have made way for what is not: it would take that back.

        Returns
        -------
        bool
            True if it has another capacity now.
        """
        with self._lock:
            self._turn += 1
            seat.begin(self._turn)
            if len(self._seats) < 2 or not may_borrow:
                return False
            uses = seat.uses()
            borrowed = [self._borrow(seat, memory, uses[memory]) for memory in uses if not seat.is_said(memory)]
            return any(borrowed)

    def _borrow(self, seat: Seat, memory: str, use: Use) -> bool:
        occupant, missing = seat.occupant, use.claim.wish - use.capacity
        if occupant is None or memory == DISK or missing <= 0:
            return False
        taken = 0
        for other in sorted(self._seats, key=lambda each: each.turn):
            lender = other.occupant
            if other is seat or other.is_said(memory) or lender is None or not lender.is_idle or taken >= missing:
                continue
            has = lender.uses().get(memory)
            if has is not None and (spare := min(has.capacity - has.least, missing - taken)) > 0:
                taken += has.capacity - lender.cut(memory, has.capacity - spare)
        if taken > 0:
            occupant.grow(memory, use.capacity + taken)
        return taken > 0

    # -- numbers

    def _divide(self, memory: str, total: int) -> dict[Seat, int]:
        seats = [each for each in self._seats if memory in each.uses()]
        return dict(zip(seats, share(total, [each.uses()[memory].claim for each in seats]), strict=True))

    def _wants(self) -> dict[str, Wants]:
        """What all models want of each memory."""
        found: dict[str, Wants] = {}
        for seat in self._seats:
            non_model = 0 if (occupant := seat.occupant) is None else occupant.non_model_bytes
            for memory, use in seat.uses().items():
                so_far = found.get(memory) or Wants(floor=0, wish=0, capacity=0, used=0)
                found[memory] = Wants(
                    floor=so_far.floor + use.claim.floor,
                    wish=so_far.wish + use.claim.wish,
                    capacity=so_far.capacity + _held(use),
                    used=so_far.used + use.used,
                    non_model=max(so_far.non_model, non_model),
                )
        for memory, nbytes in self.said.items():
            if memory in found:
                claim = Claim(floor=nbytes, wish=nbytes)
                before = found[memory]
                found[memory] = Wants(
                    floor=claim.floor, wish=claim.wish, capacity=nbytes, used=before.used, non_model=before.non_model
                )
        return found


def _held(use: Use) -> int:
    """What a model may take, as far as it can make use of it."""
    return max(use.used, min(use.capacity, use.claim.wish))


def said_sizes(given: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by memory, of those sizes that a user has given."""
    return {memory: nbytes for memory, nbytes in given.items() if nbytes is not None}
