"""What becomes of the tensors that each unit saves for its backward: kept, moved, or computed again. Pure: no torch.

Forward and backward are a palindrome: what the first unit saves is needed last. So, where all does not fit:

1. *Move what hides.* From the first unit on, as long as writing ends with forward and each unit's tensors are back when
   backward comes to it. What the last units save is kept: it is needed at once (MEMO, arXiv 2407.12117; ProTrain,
   arXiv 2406.08334, which also decides by blocks).
2. *Then the cheaper of both for each unit*, moving in sight or running forward again, by bytes saved per second added
   (Capuchin, ASPLOS 2020, DOI 10.1145/3373376.3378505: "memory saving per second").
3. *Then what memory demands*: the inputs of units that run again move, too, and at last everything does: of a unit that
   moves only some tensors are there at once in its backward, of one that runs again all.

At the end each unit whose choice turned out to be needless keeps again, the last chosen one first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

BACKWARD_PER_FORWARD = 2.0
"""Seconds of a unit's backward per second of its forward: a matrix product has two in backward."""


class Choice(Enum):
    """What becomes of the tensors that a unit's forward saves for its backward."""

    KEEP = "keep"
    """They stay where they are; nothing of ours runs."""
    OFFLOAD = "offload"
    """They move to a tier below, and come back ahead of the unit's backward."""
    RECOMPUTE = "recompute"
    """Only the unit's inputs stay; its forward runs again in backward."""
    RECOMPUTE_OFFLOAD = "recompute+offload"
    """Its forward runs again, from inputs that have moved meanwhile."""

    @property
    def moves(self) -> bool:
        """True if what stays saved in forward moves to a tier below."""
        return self in (Choice.OFFLOAD, Choice.RECOMPUTE_OFFLOAD)

    @property
    def recomputes(self) -> bool:
        """True if the unit's forward runs again in backward."""
        return self in (Choice.RECOMPUTE, Choice.RECOMPUTE_OFFLOAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one unit was measured to save in a forward, all of its visits together."""

    unit: int
    """Its index: any numbers that tell units apart."""
    saved_bytes: int
    """Of the tensors that it saves for backward, each storage once; parameters and what others hold anyway not."""
    forward_seconds: float
    movable_bytes: int
    """Of the saved bytes, those that may move to a tier below."""
    input_bytes: int = 0
    """Of the inputs that must stay so that its forward can run again."""
    can_recompute: bool = True
    """False for a unit whose forward may not run twice."""

    def allows(self, choice: Choice, link: "Link | None") -> bool:
        """True if this may become of what the unit saves."""
        if choice.moves and (link is None or not self.moved_bytes(choice)):
            return False
        return self.can_recompute or not choice.recomputes

    def moved_bytes(self, choice: Choice) -> int:
        """Bytes that leave in forward and come back in backward."""
        if choice is Choice.OFFLOAD:
            return self.movable_bytes
        return self.input_bytes if choice is Choice.RECOMPUTE_OFFLOAD else 0

    def held_bytes(self, choice: Choice) -> int:
        """Bytes that stay between the unit's forward and its backward."""
        if choice is Choice.RECOMPUTE:
            return self.input_bytes
        if choice is Choice.RECOMPUTE_OFFLOAD:
            return 0
        return self.saved_bytes - self.moved_bytes(choice)

    def backward_bytes(self, choice: Choice, link: "Link | None") -> int:
        """Bytes that are there in the unit's backward."""
        if choice is Choice.OFFLOAD and link is not None:
            return self.held_bytes(choice) + min(self.movable_bytes, link.ahead_bytes)
        return self.saved_bytes + (self.input_bytes if choice.recomputes else 0)

    def added_seconds(self, choice: Choice, link: "Link | None") -> float:
        """Seconds that a choice costs if nothing of it hides."""
        moved = link.seconds(self.moved_bytes(choice)) if link is not None else 0.0
        return moved + (self.forward_seconds if choice.recomputes else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way to the tier below."""

    down_bytes_per_second: float
    up_bytes_per_second: float
    ahead_bytes: int = 0
    """Room for tensors on their way, in either direction."""

    def __post_init__(self) -> None:
        for name in ("down_bytes_per_second", "up_bytes_per_second"):
            if not getattr(self, name) > 0:  # also not a number
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def seconds(self, nbytes: int) -> float:
        """Down and up again."""
        return nbytes / self.down_bytes_per_second + nbytes / self.up_bytes_per_second


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice for each unit, and what it comes to."""

    choices: Mapping[int, Choice]
    """By the units' indices."""
    peak_bytes: int
    """Saved bytes that are there at once at most, those on their way among them."""
    added_seconds: float
    """Of a step: waiting for moves, and running forward again."""

    @property
    def keeps_all(self) -> bool:
        """True if nothing of ours has to run."""
        return all(choice is Choice.KEEP for choice in self.choices.values())


def choose(units: Sequence[UnitCost], room_bytes: int, link: Link | None) -> Decision:
    """Choose for each unit so that the saved tensors fit, in the least time.

    Parameters
    ----------
    units
        In the order of their forwards.
    room_bytes
        For saved tensors: what model data and temporaries leave. If nothing fits, the decision is the one with the
        lowest peak that was found, and its ``peak_bytes`` are above this.
    link
        To the tier to which tensors may move; None if there is none.
    """
    return _Search(units, room_bytes, link).run()


def all_alike(units: Iterable[int], choice: Choice) -> dict[int, Choice]:
    """The same for all units."""
    return dict.fromkeys(units, choice)


def first_choice(
    units: Iterable[int], expected_bytes: int | None, room_bytes: int, has_link: bool
) -> dict[int, Choice]:
    """What to do in a first forward, before anything has been measured: keep if that is known to fit, else be safe.

    Parameters
    ----------
    expected_bytes
        An estimate of non-model data if all is kept; None if there is none.
    has_link
        True if there is a tier to which tensors may move.
    """
    fits = expected_bytes is not None and expected_bytes <= room_bytes
    safe = Choice.OFFLOAD if has_link else Choice.RECOMPUTE
    return all_alike(units, Choice.KEEP if fits else safe)


def added_seconds(units: Sequence[UnitCost], choices: Sequence[Choice], link: Link | None) -> float:
    """Seconds by which a step is longer than one that keeps all.

    One queue writes in the order of forward and another one reads in the order of backward, each beside computing; what
    has not been written when forward ends, and what has not come when backward needs it, is waited for.
    """
    plain = sum(unit.forward_seconds for unit in units)
    clock = written = 0.0
    for unit, choice in zip(units, choices, strict=True):
        clock += unit.forward_seconds
        moved = unit.moved_bytes(choice)
        if moved and link is not None:
            written = max(written, clock) + moved / link.down_bytes_per_second
    waited = max(written - clock, 0.0)
    clock = read = 0.0
    for unit, choice in zip(reversed(units), reversed(choices), strict=True):
        moved = unit.moved_bytes(choice)
        if moved and link is not None:
            read += moved / link.up_bytes_per_second
            clock = max(clock, read)
        clock += unit.forward_seconds * (BACKWARD_PER_FORWARD + choice.recomputes)
    return waited + clock - plain * BACKWARD_PER_FORWARD


def peak_bytes(units: Sequence[UnitCost], choices: Sequence[Choice], link: Link | None) -> int:
    """The most saved bytes at once: at each unit what stays of those before it, and its own.

    ::

        unit            0     1     2     3
        its forward     held  held  held  saved -> held, what moves beside it
        its backward    held  held  back        the same from the other side
    """
    ahead = link.ahead_bytes if link is not None else 0
    held = most = 0
    for unit, choice in zip(units, choices, strict=True):
        moved = min(unit.moved_bytes(choice), ahead)
        most = max(most, held + unit.backward_bytes(choice, link), held + unit.held_bytes(choice) + moved)
        held += unit.held_bytes(choice)
    return most


class _Search:
    """The choices so far, and the order in which they were made."""

    def __init__(self, units: Sequence[UnitCost], room_bytes: int, link: Link | None) -> None:
        self._units = units
        self._room = room_bytes
        self._link = link
        self._choices = [Choice.KEEP] * len(units)
        self._chosen: list[int] = []

    def run(self) -> Decision:
        for step in (self._move_hidden, self._take_cheaper, self._move_inputs, self._move_all):
            if self._fits():
                break
            step()
        self._relax()
        choices = {unit.unit: choice for unit, choice in zip(self._units, self._choices, strict=True)}
        return Decision(choices, self._peak(), added_seconds(self._units, self._choices, self._link))

    def _peak(self) -> int:
        return peak_bytes(self._units, self._choices, self._link)

    def _fits(self) -> bool:
        return self._peak() <= self._room

    def _take(self, at: int, choice: Choice) -> None:
        self._choices[at] = choice
        self._chosen.append(at)

    def _move_hidden(self) -> None:
        for at, unit in enumerate(self._units):
            if self._fits():
                return
            if unit.allows(Choice.OFFLOAD, self._link):
                self._take(at, Choice.OFFLOAD)
                if added_seconds(self._units, self._choices, self._link) > 0:
                    self._choices[at] = Choice.KEEP
                    self._chosen.pop()

    def _take_cheaper(self) -> None:
        ways = []
        for at, unit in enumerate(self._units[:-1]):  # what the last one saves is needed at once
            if self._choices[at] is Choice.KEEP:
                possible = [c for c in (Choice.RECOMPUTE, Choice.OFFLOAD) if unit.allows(c, self._link)]
                rated = [(self._bytes_per_second(unit, choice), choice) for choice in possible]
                if rated:
                    rate, choice = max(rated, key=lambda way: way[0])
                    ways.append((-rate, at, choice))
        for _, at, choice in sorted(ways, key=lambda way: way[:2]):
            if self._fits():
                return
            self._take(at, choice)

    def _bytes_per_second(self, unit: UnitCost, choice: Choice) -> float:
        freed = unit.saved_bytes - unit.held_bytes(choice)
        return freed / max(unit.added_seconds(choice, self._link), 1e-9)

    def _move_inputs(self) -> None:
        for at, unit in enumerate(self._units):
            if self._fits():
                return
            if self._choices[at] is Choice.RECOMPUTE and unit.allows(Choice.RECOMPUTE_OFFLOAD, self._link):
                self._take(at, Choice.RECOMPUTE_OFFLOAD)

    def _move_all(self) -> None:
        """The units that have most in their backward decide the peak; the last one is among them."""
        for at, unit in enumerate(self._units):
            if unit.allows(Choice.OFFLOAD, self._link) and self._choices[at] is not Choice.OFFLOAD:
                before, choice = self._peak(), self._choices[at]
                self._take(at, Choice.OFFLOAD)
                if self._peak() > before:
                    self._choices[at] = choice
                    self._chosen.pop()

    def _relax(self) -> None:
        for at in reversed(self._chosen):
            choice, limit = self._choices[at], max(self._room, self._peak())
            self._choices[at] = Choice.KEEP
            if self._peak() > limit:
                self._choices[at] = choice
