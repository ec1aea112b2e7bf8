"""A model keeps to its budget: between steps its homes follow, between units the full copies that nothing uses.

What the machine, its user or another run asks of it becomes calls of the engine here, on the thread that trains.
"""

from collections.abc import Mapping

from ..chunk import Tier
from ..engine import Engine, in_backward
from ..errors import GeminiError, is_out_of_memory
from ..lease.asked import Asked
from ..lease.budget import Budget
from ..lease.seat import Seat, Use
from ..lease.sharing import Claim
from ..lease.standing import DEVICE
from ..packing.packing import Packing
from ..process_wide import trim_freed_memory
from ..sizes import format_bytes

_TIERS = {tier.value: tier for tier in Tier}
_HALVINGS = 3
"""How often a capacity between that of now and the one that is wanted is tried, where homes have no place."""


class Tenancy:
    """One model in a budget (an `Occupant`).

    Parameters
    ----------
    engine
        Moves chunks and homes.
    budget, seat
        What the model shares, and its place there.
    """

    def __init__(self, engine: Engine, budget: Budget, seat: Seat) -> None:
        self.budget = budget
        self.seat = seat
        self._engine = engine
        self._sizes: tuple[Packing, _Sizes] | None = None
        self._is_behind = False
        """Full copies made room within a forward; homes are to follow before the next one."""

    # -- what hooks call

    def before_forward(self) -> None:
        """The model is about to run, outside of any backward: follow what is asked and granted."""
        if self._engine.manager.rehoming.parking is not None:
            return  # it has nothing, and the forward will be refused
        if self.budget.is_due or self._is_behind:
            self._is_behind = False
            self.budget.look(self.seat)
            if (asked := self.budget.take_asked()) is not None:
                self._follow(asked)
            elif targets := self._targets():
                self._go_to(targets)
        if self.budget.begin(self.seat, may_borrow=not self._engine.memory.is_lowered):
            self._engine.pacing.replan()

    def look_before_unit(self) -> None:
        """A unit is about to run, and a look is due: give back full copies if others need their room."""
        self.budget.look(self.seat)
        uses = self.uses()
        smaller = {m: n for m, n in self.budget.targets(self.seat).items() if n < uses[m].capacity}
        for memory, nbytes in smaller.items():
            self.cut(memory, nbytes)
        if smaller:
            self._is_behind = True
            self.budget.settled()

    # -- what users call

    def set(self, nbytes: Mapping[str, int]) -> None:
        """Have the model take these from now on, by memory.

        Raises
        ------
        ValueError
            If it has no such memory, or its budget has less.
        OutOfMemory, OffloadError
            If it cannot do with that. Nothing has been changed.
        """
        self._refuse_unknown(nbytes)
        for memory, each in nbytes.items():
            if each > self.budget.said.get(memory, each):
                raise ValueError(
                    f"{memory}_memory of {format_bytes(each)} is more than the model's budget has, "
                    f"{format_bytes(self.budget.said[memory])}: give the budget more"
                )
        self.resize(nbytes)
        self.seat.say(nbytes)
        self.budget.settled()

    # -- Occupant

    @property
    def is_idle(self) -> bool:
        visits = self._engine.visits
        return not (visits.open or visits.running or visits.is_in_backward or in_backward())

    @property
    def non_model_bytes(self) -> int:
        return self._engine.sampling.meter.peak_bytes if self._engine.manager.device.is_ram else 0

    def uses(self) -> dict[str, Use]:
        ledger, sizes = self._engine.manager.ledger, self._measured
        if self._engine.manager.rehoming.parking is not None:
            nothing = Use(claim=Claim(floor=0, wish=0), capacity=0, used=0, least=0)
            return {pool.value: nothing for pool in ledger.memory.pools if ledger.capacity(pool)}
        found = {}
        for pool in ledger.memory.pools:
            is_compute = pool is ledger.memory.compute_tier
            homes = sum(sizes.homes[tier] for tier in Tier if ledger.memory.pool(tier) is pool)
            copies = self._engine.manager.full_copies.nbytes if is_compute else 0
            used, capacity = ledger.used(pool), ledger.capacity(pool)
            others = max(0, used - homes - copies)  # staging, room for gradients
            ring = self._ring_bytes if is_compute else 0
            moves = pool is not Tier.DISK and self._can_move_homes
            floor = min(others + ring + (0 if moves else homes), max(capacity, used))
            wish = others + sizes.all_homes + (sizes.copies if is_compute else 0)
            if not capacity and not used:
                continue
            found[pool.value] = Use(
                claim=Claim(floor=floor, wish=max(floor, wish)),
                capacity=capacity,
                used=used,
                least=min(homes + others + ring, capacity),
            )
        return found

    def cut(self, memory: str, nbytes: int) -> int:
        manager, tier = self._engine.manager, _TIERS[memory]
        with self._engine.lock:
            before = manager.ledger.capacity(tier)
            after = min(before, max(nbytes, self.uses()[memory].least))
            manager.eviction.make_room_for(tier, before - after)
            manager.ledger.resize(tier, after)  # never below what is used
            manager.device.trim()
            if manager.device.is_ram:
                trim_freed_memory()
            return manager.ledger.capacity(tier)

    def grow(self, memory: str, nbytes: int) -> None:
        with self._engine.lock:
            self._engine.manager.ledger.resize(_TIERS[memory], nbytes)

    def resize(self, nbytes: Mapping[str, int]) -> None:
        self._engine.resize({_TIERS[memory]: each for memory, each in nbytes.items()})

    # -- following

    def _follow(self, asked: Asked) -> None:
        """Do what a user asks of this run, and answer."""
        before = self.budget.ask(asked.nbytes)
        try:
            self._refuse_unknown(asked.nbytes)
            if not self._engine.manager.together.communicator.owner.is_alone:
                raise ValueError(
                    "one of several ranks cannot change by itself: have all of them call booster.resize, or start them "
                    "again from a checkpoint with other arguments"
                )
            if targets := self.budget.targets(self.seat):
                self.resize(targets)
                self.budget.resized(self.seat, targets)
        except (GeminiError, ValueError, RuntimeError, OSError) as error:
            self.budget.ask_again(before)
            self.budget.answer(asked, False, str(error))
            return
        self.budget.answer(asked, True, ", ".join(f"{m} {format_bytes(n)}" for m, n in asked.nbytes.items()))

    def _targets(self) -> dict[str, int]:
        """What the budget grants. Of an accelerator no more is taken while what the rest will take is a guess."""
        targets, engine = self.budget.targets(self.seat), self._engine
        granted = targets.get(DEVICE, 0)
        if granted > engine.manager.ledger.capacity(Tier.DEVICE) and engine.room.is_guessed(engine.sampling.profile):
            del targets[DEVICE]
        return targets

    def _go_to(self, targets: Mapping[str, int]) -> None:
        """Have these capacities, or as near to them as homes find a place."""
        if not self._can_move_homes:
            for memory, nbytes in targets.items():
                self._go_without_homes(memory, nbytes)
            self.budget.settled()
            return
        uses, wanted = self.uses(), dict(targets)
        for _ in range(_HALVINGS):
            try:
                self.resize(wanted)
            except (RuntimeError, OSError) as error:
                if not is_out_of_memory(error) and not isinstance(error, GeminiError):
                    raise
                wanted = {m: (n + uses[m].capacity) // 2 for m, n in wanted.items()}
                continue
            self.budget.resized(self.seat, wanted)
            if wanted != targets:
                self.budget.refused(self.seat, wanted)
            return
        self.budget.refused(self.seat, targets)

    def _go_without_homes(self, memory: str, nbytes: int) -> None:
        capacity = self._engine.manager.ledger.capacity(_TIERS[memory])
        if nbytes < capacity:
            self.cut(memory, nbytes)
        else:
            self.grow(memory, nbytes)
        self.seat.give(memory, nbytes)

    def _refuse_unknown(self, nbytes: Mapping[str, int]) -> None:
        has = self.uses()
        if unknown := [memory for memory in nbytes if memory not in has]:
            raise ValueError(
                f"this model has no {unknown[0]} tier of its own, it has {', '.join(has)}: "
                "device_memory is for accelerators, disk_memory needs GeminiPlugin(offload_dir=...)"
            )

    @property
    def _can_move_homes(self) -> bool:
        """False for one of several ranks, which would have to move them together."""
        manager = self._engine.manager
        return manager.disk is not None and manager.together.communicator.owner.is_alone

    @property
    def _ring_bytes(self) -> int:
        """Full copies that one moment needs."""
        return self._engine.pacing.seen_bytes() or self._engine.memory.packing.sibling_peak_bytes

    @property
    def _measured(self) -> "_Sizes":
        packing = self._engine.memory.packing
        if self._sizes is None or self._sizes[0] is not packing:
            self._sizes = packing, _Sizes(packing)
        return self._sizes[1]


class _Sizes:
    """Bytes of a model's homes and full copies."""

    def __init__(self, packing: Packing) -> None:
        self.homes = {tier: sum(plan.nbytes_on(tier) for plan in packing.plans) for tier in Tier}
        self.all_homes = sum(self.homes.values())
        self.copies = sum(
            plan.layout.numel * plan.compute_dtype.itemsize for plan in packing.plans if not plan.full_is_home
        )
