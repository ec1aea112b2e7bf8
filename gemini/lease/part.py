"""What one process (or one budget of it) may take of the machine, beside other runs: asked for, granted, followed."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from gemini.lease.asked import Asked
from gemini.lease.holder import Holder, Holds, LimitsOf
from gemini.lease.pressure import PressureGauge
from gemini.lease.room import capacity_of, room_of
from gemini.lease.sharing import Claim
from gemini.lease.standing import HOST, Answer
from gemini.lease.steady import Steady

logger = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
"""The longest that a start waits for what others give back; they do so at their next step."""
LOOK_SECONDS = 0.5
"""Between two looks at the leases of others and at the machine. A look takes about a millisecond."""
_STEP = 16 << 20
"""What is told of what is used is a multiple of this: the file is rewritten when it changes."""
_NEARLY = 0.99
_NON_MODEL_MARGIN = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Wants:
    """What the models of a budget want of one memory together, in bytes of model data."""

    floor: int
    wish: int
    capacity: int
    """What they may take now, as far as they can make use of it."""
    used: int
    non_model: int = 0
    """The peak of everything else, where it was measured."""

    def room(self, memory: str, capacity: int) -> int:
        """The bytes of the machine's that it takes to have this capacity."""
        if memory != HOST or not capacity:
            return capacity
        return max(room_of(capacity), capacity + int(self.non_model * _NON_MODEL_MARGIN))

    def capacity_in(self, memory: str, room: int) -> int:
        """What model data may take of a room."""
        if memory != HOST:
            return room
        return max(0, min(capacity_of(room), room - int(self.non_model * _NON_MODEL_MARGIN)))


class MachinePart:
    """Keeps the lease of a budget in step with what its models want, and tells them how much there is.

    Parameters
    ----------
    holder
        Has the lease.
    gauge
        Tells whether programs here wait for memory.
    """

    def __init__(self, holder: Holder, gauge: PressureGauge) -> None:
        self._holder = holder
        self._gauge = gauge
        self._steady: dict[str, Steady] = {}
        """By memory, what is followed where there is less than the models can make use of."""
        self.next_look = 0.0
        """When it is time for another look, by ``time.monotonic()``."""

    def watch(self, limits: Mapping[str, LimitsOf]) -> None:
        """These limits bound what is held from now on, beside those known."""
        self._holder.watch(limits)

    def say(self, wants: Mapping[str, Wants], is_waiting: bool = False, answer: Answer | None = None) -> None:
        """Tell other runs what is wanted and held."""
        holds = {}
        for memory in wants.keys() & self._holder.memories:
            want = wants[memory]
            floor, wish = want.room(memory, want.floor), want.room(memory, want.wish)
            held = 0 if is_waiting and not want.capacity else want.room(memory, want.capacity)
            used = -(-want.used // _STEP) * _STEP
            holds[memory] = Holds(claim=Claim(floor=min(floor, wish), wish=wish), held=held, used=used)
        self._holder.say(holds, is_waiting, answer)

    def begin(self, memory: str, want: Wants) -> int:
        """The capacity for models of which one is about to be built; waits for what others are to give back.

        Where all wishes are met it is what others leave; else what is granted to this one.
        """
        wish = want.room(memory, want.wish)
        found = self._holder.look()[memory]
        if found.left < wish and found.others:
            seconds = WAIT_SECONDS
            logger.info("waiting up to %g s for what other runs on this machine give back", seconds)
            found = self._holder.wait(memory, lambda seen: seen.left >= min(seen.grant, wish) * _NEARLY, seconds)
        room = found.left if found.grant >= wish or not found.others else min(found.left, found.grant)
        if room < wish:
            self._steady[memory] = Steady(room)
        return want.capacity_in(memory, room)

    def look(self, wants: Mapping[str, Wants]) -> dict[str, int | None]:
        """The capacities from now on, by memory; None where there is as much as the models can make use of."""
        now = time.monotonic()
        self.next_look = now + LOOK_SECONDS
        self.say(wants)
        is_pressed = self._gauge.is_pressed(now)
        found: dict[str, int | None] = {}
        for memory, seen in self._holder.look().items():
            want = wants[memory]
            wish, floor = want.room(memory, want.wish), want.room(memory, want.floor)
            before = self._steady.pop(memory, None) or Steady(wish)
            grant = min(seen.grant, wish)
            if grant > before.held:
                grant = min(grant, max(before.held, seen.left))
            after = before.follow(grant, floor, now, is_pressed and memory == HOST)
            if after.held >= wish * _NEARLY:
                found[memory] = None
            else:
                self._steady[memory] = after
                found[memory] = want.capacity_in(memory, after.held)
        return found

    def take_asked(self) -> Asked | None:
        """What a user asks of this run, once."""
        return self._holder.take_asked()

    def end(self) -> None:
        """Give everything back."""
        self._holder.end()
