"""Homes follow the capacities of their tiers: they go down where these shrink, and come up where there is room."""

from collections.abc import Collection, Mapping, Sequence

import torch

from ..chunk import GRADIENT, Chunk, ChunkManager, ChunkPlan, Tier
from ..config import GeminiConfig
from ..errors import OutOfMemory
from ..packing.packing import Packing
from ..packing.resizing import Resizing, home_bytes, moves, resized
from ..planning.placement import Unplaced
from ..process_wide import trim_freed_memory
from ..sizes import format_bytes
from ..updates.gradients import Gradients
from .pacing import Pacing

Staying = Mapping[Chunk, frozenset[str]]
"""Buffers that stay where they are."""
_ATTEMPTS = 9
"""Each adds what the one before lacked; two or three do."""
_SHOWN_NAMES = 3


class HomeRoom:
    """Gives tiers other capacities while a model is trained.

    Parameters
    ----------
    manager, gradients, pacing
        The chunks, what ``p.grad`` shows of their gradients, and what is known of their use.
    config, packing
        What the user has said, and what was decided when the model was boosted.
    """

    def __init__(
        self, manager: ChunkManager, gradients: Gradients, pacing: Pacing, config: GeminiConfig, packing: Packing
    ) -> None:
        self.packing = packing
        """The plans of the chunks, as they are now."""
        self._manager = manager
        self._gradients = gradients
        self._pacing = pacing
        self._config = config

    def adopt(self, packing: Packing) -> None:
        """Some chunks have other plans now."""
        self.packing = packing

    def resize(self, capacities: Mapping[Tier, int], *, at_least: bool = False, in_pass: bool = False) -> bool:
        """Set what tiers may hold, and move homes as that asks for. All or nothing.

        Parameters
        ----------
        at_least
            Where homes would have no place, take less from a tier: nothing is refused that fits into what it has.
        in_pass
            A forward or backward runs, whose graph may have saved full copies that are homes: these stay.

        Returns
        -------
        bool
            True if homes have moved.

        Raises
        ------
        OutOfMemory, OffloadError
            If they have no place then, or cannot be moved.
        ValueError
            If tiers that share one memory are given several capacities.
        """
        manager, ledger = self._manager, self._manager.ledger
        wanted = self._pools(capacities)
        manager.snapshots.rest()
        held = {chunk for chunk in manager.chunks if not self._gradients.give_way(chunk)}
        staying = {chunk: names for chunk in manager.chunks if (names := self._staying(chunk, held, in_pass))}
        try:
            wanted, after = self._fitting(wanted, staying) if at_least else (wanted, self._decide(wanted, staying))
            if isinstance(after, Unplaced):
                raise self._out_of_memory(wanted, after, staying)
            before = {tier: ledger.capacity(tier) for tier in wanted}
            for tier, nbytes in wanted.items():
                ledger.resize(tier, max(nbytes, before[tier]))
            try:
                manager.rehoming.move(after)
            except BaseException:
                for tier, nbytes in before.items():
                    ledger.resize(tier, nbytes)
                raise
            finally:
                self.packing = self.packing.with_plans([chunk.plan for chunk in manager.chunks])
                if manager.device.is_ram:
                    trim_freed_memory()
        finally:
            self._gradients.moved(chunk for chunk in manager.chunks if chunk.gradient is not None)
        for tier, nbytes in wanted.items():
            manager.eviction.make_room_for(tier, ledger.capacity(tier) - nbytes)
            ledger.resize(tier, nbytes)
        return bool(after)

    def _pools(self, capacities: Mapping[Tier, int]) -> dict[Tier, int]:
        """The capacities by the pool that they bound."""
        found = dict[Tier, int]()
        for tier, nbytes in capacities.items():
            pool = self._manager.ledger.memory.pool(tier)
            if nbytes < 0 or found.setdefault(pool, nbytes) != nbytes:
                given = ", ".join(f"{t.value}={n}" for t, n in capacities.items())
                raise ValueError(
                    f"expected one capacity of at least 0 bytes for {pool.value}, got {given}: tiers that "
                    "share one memory have one capacity together"
                )
        return found

    def _fitting(self, wanted: dict[Tier, int], staying: Staying) -> tuple[dict[Tier, int], list[ChunkPlan] | Unplaced]:
        """The capacities, with what they lack of those of now, and the answer of `_decide` to them."""
        after = self._decide(wanted, staying)
        for _ in range(_ATTEMPTS):
            if not isinstance(after, Unplaced):
                break
            more = {tier: nbytes + after.missing_bytes for tier, nbytes in wanted.items()}
            wanted = {tier: min(nbytes, self._manager.ledger.capacity(tier)) for tier, nbytes in more.items()}
            after = self._decide(wanted, staying)
        return wanted, after

    def _decide(self, wanted: Mapping[Tier, int], staying: Staying) -> list[ChunkPlan] | Unplaced:
        """The plans of chunks whose homes are to move."""
        manager, memory, use = self._manager, self._manager.ledger.memory, self.packing.use
        fixed = frozenset(chunk.index for chunk in manager.chunks if self._stays(chunk, wanted, staying))
        plans = tuple(chunk.plan for chunk in manager.chunks)
        order = self._pacing.use_order()
        found = resized(
            Resizing(
                plans=plans,
                order=sorted(order, key=order.__getitem__),
                room={pool: self._room(pool, wanted, fixed, staying) for pool in memory.pools},
                fixed=fixed,
                staying={chunk.index: names for chunk, names in staying.items() if chunk.index not in fixed},
                in_use=[*self._pacing.seen(), *(chunks for _, chunks in use.units)],
                likely=[chunks for _, chunks in use.siblings],
                memory=memory,
                policy=self._config.policy,
                split_master=self._config.split_master,
                max_prefetch=self._config.max_prefetch,
                has_ring=memory.compute_tier is not Tier.DEVICE or Tier.DEVICE in wanted,
            )
        )
        return found if isinstance(found, Unplaced) else moves(plans, found)

    def _stays(self, chunk: Chunk, wanted: Mapping[Tier, int], staying: Staying) -> bool:
        """True if the homes of a chunk cannot move now, or its tier is not asked about."""
        plan = chunk.plan
        if GRADIENT in staying.get(chunk, ()) and (GRADIENT not in plan.tiers or chunk.is_shared):
            return True  # its gradient lies in memory that is borrowed by the tier of the masters
        is_apart = self._manager.ledger.memory.compute_tier is Tier.DEVICE
        return is_apart and chunk.tier is Tier.DEVICE and Tier.DEVICE not in wanted

    def _staying(self, chunk: Chunk, held: Collection[Chunk], in_pass: bool) -> frozenset[str]:
        """The buffers of a chunk that cannot move now, while others of it can.

        A full copy that is a home stays one while it is in use, while code outside holds its memory, and while a graph
        may have saved it, whose memory would be beside the new home's.
        """
        plan, names = chunk.plan, frozenset[str]()
        may_be_home = chunk.full_is_home or plan.compute_dtype is torch.float32 or self._config.split_master
        if may_be_home and (chunk.pins or chunk.is_lent or in_pass):
            names |= {spec.name for spec in plan.codec.specs}
        return names | {GRADIENT} if chunk in held else names

    def _room(
        self,
        pool: Tier,
        wanted: Mapping[Tier, int],
        fixed: Collection[int],
        staying: Staying,
    ) -> int:
        """Bytes of a pool for full copies and for homes that may move."""
        manager, ledger = self._manager, self._manager.ledger
        if (pool is Tier.DEVICE and pool not in wanted) or (pool is Tier.DISK and manager.disk is None):
            return 0  # a folder is given, and RAM had no room for staging
        tiers = [tier for tier in Tier if ledger.memory.pool(tier) is pool]
        homes = stay = 0
        for chunk in manager.chunks:
            nbytes = sum(home_bytes(chunk.plan, tier) for tier in tiers)
            names = staying.get(chunk, ())
            homes += nbytes
            stay += nbytes if chunk.index in fixed else sum(home_bytes(chunk.plan, tier, names) for tier in tiers)
        copies = manager.full_copies.nbytes if pool is ledger.memory.compute_tier else 0
        others = ledger.used(pool) - homes - copies  # staging, and room for borrowed gradients
        return wanted.get(pool, ledger.capacity(pool)) - others - stay

    def _what_stays(self, wanted: Mapping[Tier, int], found: Unplaced, staying: Staying) -> str:
        """What cannot move and would leave room, in words, and how to let it go; empty if that would not help."""
        others = self._decide(wanted, {})
        if isinstance(others, Unplaced) and others.missing_bytes >= found.missing_bytes:
            return ""
        lent, addressed, held, waiting = list[str](), list[str](), list[str](), list[str]()
        for chunk in staying:
            if chunk.loan is not None and chunk.is_lent:
                lent += (chunk.layout.slots[position].name for position in chunk.loan.held_positions)
                if chunk.loan.is_addressed:
                    addressed += (chunk.layout.slots[position].name for position in chunk.loan.positions)
            if GRADIENT in staying[chunk]:
                theirs, ours = self._gradients.staying(chunk)
                held, waiting = held + theirs, waiting + ours
        parts = []
        if lent:
            parts.append(
                f"drop what holds memory of {_some(lent)} (p.data, p.detach(), an array, a view), or hold a clone"
            )
        if addressed:
            parts.append(f"run a forward, until which addresses of {_some(addressed)} that were asked for are good")
        if held:
            parts.append(f"drop what holds the gradient of {_some(held)} (p.grad, a view of it), or hold a clone")
        if held or waiting:
            gradients = _some(held + waiting)
            parts.append(f"call optimizer.step() and zero_grad() first: until then the gradients of {gradients} stay")
        return f". Or, as this cannot move and takes room: {'; '.join(parts)}" if parts else ""

    def _out_of_memory(self, wanted: Mapping[Tier, int], found: Unplaced, staying: Staying) -> OutOfMemory:
        ledger = self._manager.ledger
        asked = " and ".join(f"{tier.value} of {format_bytes(nbytes)}" for tier, nbytes in wanted.items())
        tier = next(iter(found.working_bytes), Tier.HOST)
        enough = wanted.get(tier, ledger.capacity(tier)) + found.missing_bytes
        has_disk = self._manager.disk is not None
        way_out = "" if has_disk else ", or boost with a folder for what RAM has no room for (offload_dir)"
        return OutOfMemory(
            f"{tier.value} tier out of memory. With {asked}, {format_bytes(found.missing_bytes)} of the model data and "
            f"the room to work on them have no place; nothing has been changed. Give {tier.value} {enough} bytes "
            f"({format_bytes(enough)}) or more{way_out}{self._what_stays(wanted, found, staying)}"
        )


def _some(names: Sequence[str]) -> str:
    """The first of some names, and how many there are."""
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"
