"""What a policy says of each forward: a choice for each block, and for what is saved outside of them.

Pure: frozen values and functions in, choices out; no tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..memory.non_model import Batch
from ..planning.activation_choice import Choice, Decision, Link, UnitCost, all_alike, choose

REST = -1
"""In place of a block's number: what is saved outside of all blocks."""
WORKING_SHARE = 0.5
"""Temporaries of a block's backward, as a share of the bytes that the block saves. In a layer of GPT these are the
gradients of its wide part: 8 of 17 of the numbers that it saves."""
USED_SHARE = 0.9
"""Of the room that is found, used for what was measured: allocators round up, and other things grow."""
AFTER_SHORTAGE = 0.7
"""Each time that memory runs out the room counts as this much smaller."""
SETTLED = 4
"""Forwards of a kind after which choices are not made anew: times of the first ones are those of a warm-up."""


class Forward(Protocol):
    """The choices for one forward."""

    @property
    def is_measured(self) -> bool:
        """Blocks hold what they save until they end, and `block_ended` says what becomes of it."""

    def choice(self, block: int) -> Choice:
        """For a block that begins, or for what is saved outside of them (`REST`)."""

    def block_ended(self, cost: UnitCost) -> Choice:
        """For a block that has ended, by what it was measured to save."""

    @property
    def keeps_something(self) -> bool:
        """True if some block keeps what it saves, as far as that has been decided."""


class Advice(Protocol):
    """A policy."""

    def begin(self, batch: Batch) -> Forward | None:
        """The choices for a forward that begins; None if everything is kept, without any hooks."""

    def block_took(self, block: int, seconds: float) -> None:
        """A block's forward took so long."""

    def ended(self, rest_bytes: int, rest_movable_bytes: int) -> None:
        """A forward is over that was measured; so much was saved outside of its blocks."""

    def ran_short(self) -> bool:
        """Memory has run out in a forward or its backward; True if the next forward keeps less."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same in each forward, whatever it saves."""

    choices: Mapping[int, Choice]
    is_measured: bool = False

    def choice(self, block: int) -> Choice:
        return self.choices.get(block, Choice.KEEP)

    def block_ended(self, cost: UnitCost) -> Choice:
        return self.choice(cost.unit)

    @property
    def keeps_something(self) -> bool:
        return Choice.KEEP in self.choices.values()


class Always:
    """The policies ``"offload"`` and ``"recompute"``."""

    def __init__(self, choice: Choice, blocks: int) -> None:
        self._forward = Fixed({REST: _of_rest(choice), **all_alike(range(blocks), choice)})

    def begin(self, batch: Batch) -> Forward | None:
        return self._forward if batch.with_gradients else None

    def block_took(self, block: int, seconds: float) -> None:
        pass

    def ended(self, rest_bytes: int, rest_movable_bytes: int) -> None:
        pass

    def ran_short(self) -> bool:
        return False


class Auto:
    """The policy ``"auto"``: measures the heaviest batch so far, and chooses by what it was measured to save.

    Parameters
    ----------
    blocks
        How many there are.
    room
        Bytes that saved tensors and temporaries may take, from now on.
    link
        The way to the tier below, measured when it is first needed; None if there is none.
    """

    def __init__(self, blocks: int, room: Callable[[], int], link: Callable[[], Link | None]) -> None:
        self._blocks = blocks
        self._room = room
        self._link = link
        self._share = USED_SHARE
        self._most_bytes: int | None = None
        """What saved tensors and temporaries may take, whatever room there is; None if memory has never run out."""
        self._batch: Batch | None = None
        """The last one with gradients."""
        self._measured: _Measured | None = None
        self._measuring: _Measuring | None = None
        self._decided: dict[int, Decision] = {}
        """By the batch's number of elements."""
        self._forwards = 0
        """Since something was measured."""
        self._last: Forward | None = None
        """The latest forward with gradients; None if everything was kept."""

    def begin(self, batch: Batch) -> Forward | None:
        if not batch.with_gradients:
            return None
        self._batch = batch
        self._last = self._begin(batch)
        return self._last

    def _begin(self, batch: Batch) -> Forward | None:
        self._measuring = None
        if self._measured is None or batch.weight > self._measured.batch.weight:
            self._measuring = _Measuring(batch, self._blocks, self._usable_bytes(), self._link)
            return self._measuring
        self._forwards += 1
        if self._forwards <= SETTLED:
            self._decided.clear()
        decision = self._decided.get(batch.numel)
        if decision is None:
            costs = self._measured.costs_of(batch)
            decision = self._decided[batch.numel] = decide(costs, self._usable_bytes(), self._link)
        return None if decision.keeps_all else Fixed(decision.choices)

    def _usable_bytes(self) -> int:
        usable = int(self._room() * self._share)
        return usable if self._most_bytes is None else min(usable, self._most_bytes)

    def block_took(self, block: int, seconds: float) -> None:
        if self._measured is not None:
            self._measured = self._measured.with_seconds(block, seconds)

    def ended(self, rest_bytes: int, rest_movable_bytes: int) -> None:
        if self._measuring is not None:
            rest = UnitCost(
                unit=REST, saved_bytes=rest_bytes, movable_bytes=rest_movable_bytes, forward_seconds=0.0,
                can_recompute=False,
            )  # fmt: skip
            self._measured = _Measured(self._measuring.batch, {**self._measuring.all_costs(), REST: rest})
            self._measuring, self._forwards = None, 0
            self._decided.clear()

    def ran_short(self) -> bool:
        if self._measured is not None and self._batch is not None:  # the room may be many times what was taken
            costs = self._measured.costs_of(self._batch)
            taken = decide(costs, self._usable_bytes(), self._link).peak_bytes + working_bytes(costs)
            self._most_bytes = int(AFTER_SHORTAGE * min(taken, self._usable_bytes()))
        self._share *= AFTER_SHORTAGE
        self._decided.clear()
        return self._last is None or self._last.keeps_something


class _Measuring:
    """The choices of a forward of which nothing is known before its blocks have run.

    The first block holds what it saves until it ends; the others are taken to be like it. So the first forward is
    as safe as the later ones, and what a block turns out to save is right for the next one.
    """

    is_measured = True

    def __init__(self, batch: Batch, blocks: int, room_bytes: int, link: Callable[[], Link | None]) -> None:
        self.batch = batch
        self._costs: dict[int, UnitCost] = {}
        self._blocks = blocks
        self._room_bytes = room_bytes
        self._link = link
        self._expected: UnitCost | None = None
        self._decision: Decision | None = None

    def choice(self, block: int) -> Choice:
        if self._decision is None:
            return Choice.KEEP
        return self._decision.choices.get(block, Choice.KEEP)

    def block_ended(self, cost: UnitCost) -> Choice:
        known = self._costs.get(cost.unit)
        self._costs[cost.unit] = cost if known is None else added(known, cost)
        if self._expected is None or cost.saved_bytes > self._expected.saved_bytes:
            self._expected = cost
            self._decision = decide([*self.all_costs().values()], self._room_bytes, self._link)
        return self.choice(cost.unit)

    @property
    def keeps_something(self) -> bool:
        """Nothing is known before the first block has ended: with less room it would be as it was."""
        return self._decision is not None and Choice.KEEP in self._decision.choices.values()

    def all_costs(self) -> dict[int, UnitCost]:
        """Of each block in turn; one that did not run is taken to be like the one that saved most."""
        if self._expected is None:
            return {}
        return {block: self._costs.get(block, replace(self._expected, unit=block)) for block in range(self._blocks)}


@dataclass(frozen=True, slots=True)
class _Measured:
    """What blocks save in the forward of a batch."""

    batch: Batch
    costs: Mapping[int, UnitCost]

    def costs_of(self, batch: Batch) -> list[UnitCost]:
        """Of a batch that is not heavier, in proportion: attention may save less than that, and nothing more."""
        ratio = min(batch.numel / max(self.batch.numel, 1), 1.0)
        return [scaled(cost, ratio) for cost in self.costs.values()]

    def with_seconds(self, block: int, seconds: float) -> "_Measured":
        """With the shortest time of a block's forward: others are of a warm-up, or of a busy machine."""
        known = self.costs.get(block)
        if known is None or known.forward_seconds <= seconds:
            return self
        return replace(self, costs={**self.costs, block: replace(known, forward_seconds=seconds)})


def decide(costs: Sequence[UnitCost], room_bytes: int, link: Callable[[], Link | None]) -> Decision:
    """`choose` within what temporaries leave of a room; the link is asked for only if not everything is kept."""
    blocks = [cost for cost in costs if cost.unit != REST]
    rest = [cost for cost in costs if cost.unit == REST]
    working = working_bytes(costs)
    kept = choose(costs, room_bytes - working, None)
    if kept.keeps_all and kept.peak_bytes <= room_bytes - working:
        return kept
    return choose([*blocks, *rest], room_bytes - working, link())


def working_bytes(costs: Sequence[UnitCost]) -> int:
    """Temporaries of backward, as far as they are foreseen."""
    blocks = (cost.saved_bytes for cost in costs if cost.unit != REST)
    gradients = sum(cost.saved_bytes for cost in costs if cost.unit == REST)
    return int(WORKING_SHARE * max(blocks, default=0)) + gradients


def scaled(cost: UnitCost, ratio: float) -> UnitCost:
    """The cost of a batch that is smaller by this ratio."""
    return replace(
        cost,
        saved_bytes=int(cost.saved_bytes * ratio),
        movable_bytes=int(cost.movable_bytes * ratio),
        input_bytes=int(cost.input_bytes * ratio),
        forward_seconds=cost.forward_seconds * ratio,
    )


def added(one: UnitCost, other: UnitCost) -> UnitCost:
    """The cost of two visits of one block."""
    return replace(
        one,
        saved_bytes=one.saved_bytes + other.saved_bytes,
        movable_bytes=one.movable_bytes + other.movable_bytes,
        input_bytes=one.input_bytes + other.input_bytes,
        forward_seconds=one.forward_seconds + other.forward_seconds,
        can_recompute=one.can_recompute and other.can_recompute,
    )


def _of_rest(choice: Choice) -> Choice:
    return Choice.OFFLOAD if choice.moves else Choice.KEEP
