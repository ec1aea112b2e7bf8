"""All chunks of a model: moves them, finds a parameter's place, and reads and replaces what lies there."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from gemini.errors import is_out_of_memory

from .building import ChunkBuilder, reserve_homes
from .chunk import Chunk
from .communicator import ALONE, Communicator, Gathering, Span
from .disk import DiskBackend
from .edits import bring_edits_home, check_assigned, check_shape, put
from .gradient import GradientBuffer
from .gradient_pool import GradientPool, Use
from .layout import Slot
from .ledger import Ledger
from .memory import DeviceBackend, Transfer
from .names import MASTER
from .origin import Origin
from .plan import ChunkPlan
from .shared_gradient import SharedGradient
from .shortage import no_room, refused
from .state import ChunkState
from .tier import Tier
from .values import read_slot, write_slot
from .weak import weakly
from .workers import close_in_background


@dataclass(slots=True)
class MoveCounts:
    """What moved since the start."""

    fetch_count: int = 0
    fetch_bytes: int = 0
    demand_count: int = 0
    """Fetches that a unit had to ask for itself, because nothing had prefetched them."""
    prefetch_count: int = 0
    prefetch_used: int = 0
    late_count: int = 0
    """Prefetched full copies that had not arrived when they were needed."""
    need_count: int = 0
    """Times a visit asked for a full copy: each was there, prefetched, or fetched on demand."""
    evict_count: int = 0
    waited_seconds: dict[Tier, float] = field(default_factory=lambda: dict.fromkeys(Tier, 0.0))
    """What visits waited for full copies, by the tier that these came from."""


class ChunkManager:
    """Owns the chunks and moves them, within the ledger's capacities.

    Parameters
    ----------
    plans
        One per chunk, in chunk order.
    ledger, device, disk
        Counts, computes, stores. ``disk`` may be None if no home is on DISK.
    gradient_room
        Bytes per tier for gradients that have no home.
    headroom
        Bytes that DEVICE has beyond its capacity, as far as the system can tell. What code outside of units holds may
        take of it.
    communicator
        The other owners, where the plans name several.

    Raises
    ------
    OutOfMemory, OffloadError
        If a home gets no room.
    """

    def __init__(
        self,
        plans: Sequence[ChunkPlan],
        ledger: Ledger,
        device: DeviceBackend,
        disk: DiskBackend | None,
        gradient_room: Mapping[Tier, int] = MappingProxyType({}),
        headroom: Callable[[], int] = lambda: 0,
        communicator: Communicator = ALONE,
    ) -> None:
        self.ledger = ledger
        self.device = device
        self.disk = disk
        self.moves = MoveCounts()
        self.headroom = headroom
        """Bytes that DEVICE has beyond its capacity."""
        self.origin = Origin()
        self._communicator = communicator
        self._clock = 0
        self._full_bytes = 0
        """What the ledger counts for full copies."""
        reserve_homes(plans, ledger, device)
        self.gradient_pool = GradientPool(ledger, device, disk, weakly(self._evict_for))
        for tier, nbytes in gradient_room.items():
            self.gradient_pool.reserve(tier, nbytes, "room for the gradients of a few chunks")
        self._builder = ChunkBuilder(ledger, device, disk, self.gradient_pool, communicator)
        self.chunks = tuple(map(self._builder.build, plans))
        self._places: dict[int, tuple[Chunk, int]] = {}

    # -- places

    def bind(self, parameter: Tensor, chunk: Chunk, position: int) -> None:
        """Make ``parameter`` live in a slot: its data is its chunk's view from now on, or NaN while that is away."""
        chunk.bind(position, parameter)
        self._places[id(parameter)] = (chunk, position)

    def lends_until(self, chunk: Chunk, use: Use) -> None:
        """Take back what a chunk has borrowed for its gradient, if it has, once an update is over."""
        if isinstance(chunk.gradient, GradientBuffer) and chunk.gradient.is_borrowed:
            self.gradient_pool.retire(chunk.gradient, use)

    def complete_gradients(self) -> None:
        """A backward has come to its end: gradients that several owners keep go to the owners of their extents."""
        if self._communicator.owner.count > 1:
            for chunk in self.chunks:
                if isinstance(chunk.gradient, SharedGradient):
                    chunk.gradient.complete()

    def find(self, parameter: Tensor) -> tuple[Chunk, int] | None:
        """The chunk and the position of a parameter in it, or None if it is not managed."""
        return self._places.get(id(parameter))

    def slot(self, parameter: Tensor) -> Slot:
        chunk, position = self._places[id(parameter)]
        return chunk.layout.slots[position]

    def rebuild(self, plans: Sequence[ChunkPlan], fill: Callable[[Chunk], None] | None = None) -> None:
        """Give chunks other homes, and what else these plans say, with the values that they have. All or nothing.

        They must be at rest. What a home on DISK took is not given back: it has its place in the file. ``fill`` puts
        into the other homes of a new chunk what is not to be zero.

        Raises
        ------
        OutOfMemory, OffloadError
            If a new home gets no room; the old ones go when all new ones are there.
        ValueError
            If code outside of the manager holds memory of such a chunk.
        """
        for plan in plans:
            old = self.chunks[plan.layout.index]
            if old.is_lent:
                names = ", ".join(old.layout.slots[position].name for position in old.lend().positions)
                raise ValueError(
                    f"memory of {names} is held outside of the model (by p.data, p.detach(), a NumPy array or a view): "
                    "a copy would do no harm, but this cannot move. Drop it, or hold p.detach().clone()"
                )
            if old.state is ChunkState.FETCHING:
                self._arrive(old)  # what can go wrong goes wrong now
            old.settle()
            self.keep_edits(old)
        with self.ledger.all_or_nothing():
            reserve_homes(plans, self.ledger, self.device)
            built = [self._builder.build(plan) for plan in plans]
            for new in built:
                for position in range(len(new.layout.slots)):
                    value = read_slot(self.chunks[new.index], position, MASTER, self._communicator)
                    write_slot(new, position, MASTER, value)
                if fill is not None:
                    fill(new)
        for new in built:
            old = self.chunks[new.index]
            if old.is_resident:
                self.evict(old)
            for home in old.homes.values():
                if home.tier is not Tier.DISK:
                    self.ledger.give(home.tier, home.nbytes)
            old.become(new)

    # -- moving

    def fetch(self, chunk: Chunk, keep: Sequence[Chunk] = (), background: bool = False, overdraw: bool = False) -> None:
        """HOME -> FETCHING: make room (evicting the least recently used, but none of ``keep``) and start the move.

        With ``overdraw`` it may go beyond the capacity of DEVICE where the system has the memory.

        Raises
        ------
        OutOfMemory
            If there is no room and nothing left to evict.
        OffloadError
            If the move or the update before it failed. The chunk is at HOME then, and a later fetch tries again.
        """
        if chunk.state is not ChunkState.HOME:
            return
        self.origin.refuse_elsewhere()
        self.keep_assigned(chunk)
        self.make_room(chunk, keep, overdraw)
        begin = time.perf_counter()
        try:
            self._begin_fetch(chunk, background)
        except BaseException as error:
            if background or not is_out_of_memory(error):
                raise
            # The ledger had room, the allocator had not: whatever took it, what nothing uses can go.
            self.evict_idle(keep)
            self.device.trim()
            try:
                self._begin_fetch(chunk, background)
            except BaseException as again:
                if not is_out_of_memory(again):
                    raise
                raise refused(self.ledger, self.chunks, chunk, again) from again
        chunk.was_prefetched = background
        self.moves.fetch_count += 1
        self.moves.fetch_bytes += chunk.full_nbytes
        if background:
            self.moves.prefetch_count += 1
        else:
            self.moves.demand_count += 1
            self._count_wait(chunk, begin)

    def _begin_fetch(self, chunk: Chunk, background: bool) -> None:
        self.ledger.take(Tier.DEVICE, chunk.full_nbytes, f"the full copy of chunk {chunk.index}")
        self._full_bytes += chunk.full_nbytes
        transfer: Transfer | None = None
        try:
            self.device.grow(chunk.full)
            transfer = self._upload(chunk, chunk.update, background)
            chunk.begin_fetch(transfer)
        except BaseException:  # also the error of a pending update, where upload waited for it
            if chunk.state is ChunkState.HOME:
                if transfer is not None:  # an interrupt
                    transfer.wait()
                self._free(chunk)
            raise

    def _upload(self, chunk: Chunk, after: Transfer | None, background: bool) -> Transfer:
        own = self.device.upload(chunk.own_full, chunk.source, after, background)
        if chunk.is_whole:
            return own
        span = Span(chunk.index, MASTER, 0)
        return Gathering(own, partial(self._communicator.gather, span, chunk.full, chunk.extents))

    def pin(self, chunk: Chunk, keep: Sequence[Chunk] = ()) -> None:
        """Wait for the chunk (it must have been fetched) and keep it until `unpin`.

        Where the move ran out of memory on its way it is made again, in the room of all that nothing uses (but for
        ``keep``).
        """
        self.moves.need_count += 1
        if chunk.state is ChunkState.FETCHING:
            if chunk.was_prefetched and not chunk.has_arrived:
                self.moves.late_count += 1
            begin = time.perf_counter()
            try:
                self._arrive(chunk)
                self._count_wait(chunk, begin)
            except BaseException as error:
                if not is_out_of_memory(error):
                    raise
                self.evict_idle(keep)
                self.device.trim()
                self.fetch(chunk, keep)
                if chunk.state is ChunkState.FETCHING:
                    self._arrive(chunk)
        if chunk.was_prefetched:
            self.moves.prefetch_used += 1
            chunk.was_prefetched = False
        if chunk.is_poisoned:  # else the parameters stay where they point, and are looked at before home is
            self.keep_assigned(chunk)
        chunk.pin()
        self._clock += 1
        chunk.last_used = self._clock

    def unpin(self, chunk: Chunk) -> None:
        chunk.unpin()

    def evict(self, chunk: Chunk) -> None:
        """Free a full copy that nothing uses. Does nothing where it is the home itself, or lent."""
        if chunk.full_is_home or chunk.is_lent:
            return
        if chunk.state is ChunkState.FETCHING:
            self._arrive(chunk)
        if chunk.update is not None:
            chunk.settle()  # the update may be writing through to the full copy
        self.keep_edits(chunk)
        chunk.evict()
        self._free(chunk)
        self.moves.evict_count += 1

    def keep_edits(self, chunk: Chunk) -> None:
        """Bring home what the user, or a module in its forward, changed in a full copy in place.

        Forward and backward change no parameter, but ``nn.Embedding(max_norm=...)`` renormalises its weight, and users
        clamp or initialise parameters under ``no_grad``. Only elements that differ are written, so that the others keep
        the bits that the compute dtype has no room for. What was lent is compared as well: see [Note: Loans].

        Raises
        ------
        ValueError
            If masters are in two halves and a module has changed one in its forward: which elements differ cannot be
            told then.
        """
        self.keep_assigned(chunk)
        bring_edits_home(chunk)

    def refresh(self, chunk: Chunk) -> None:
        """Fill the full copy of a lent chunk from home again, because an update could not write through to it."""
        chunk.settle()
        self._upload(chunk, None, background=False).wait()

    def check_assigned(self, parameter: Tensor, value: Tensor) -> None:
        """See whether a tensor can be the ``data`` of a parameter; raises ValueError if not."""
        check_assigned(*self._places[id(parameter)], value)

    def assign(self, parameter: Tensor, value: Tensor) -> None:
        """Take over what is assigned to the ``data`` of a parameter whose chunk is pinned. See [Note: Loans]."""
        if value is parameter:
            return
        chunk, position = self._places[id(parameter)]
        value = value.detach()
        is_ours = any(chunk.has_memory(value) for chunk in self.chunks)
        loan = chunk.lend()
        loan.part_with(position)
        self._take(chunk, position, value)
        if not is_ours and value.dtype is chunk.full.dtype:
            loan.adopt(position, value)

    def keep_assigned(self, chunk: Chunk) -> None:
        """Bring home what the user assigned to ``p.data`` (`torch.nn.utils.vector_to_parameters` does).

        Raises
        ------
        ValueError
            If it has another shape than the parameter, which then keeps its values.
        """
        for position, value in chunk.take_assigned():
            self._take(chunk, position, value)

    def _take(self, chunk: Chunk, position: int, value: Tensor) -> None:
        check_shape(chunk, position, value)
        chunk.settle()
        if chunk.state is ChunkState.FETCHING:
            self._arrive(chunk)
        self.device.outlast(value)  # in plain PyTorch the parameter would keep it
        put(chunk, position, value)

    def _count_wait(self, chunk: Chunk, begin: float) -> None:
        self.moves.waited_seconds[chunk.tier] += time.perf_counter() - begin

    def _arrive(self, chunk: Chunk) -> None:
        try:
            chunk.finish_fetch()
        except BaseException:
            if chunk.state is ChunkState.HOME:
                self._free(chunk)
            raise

    def _free(self, chunk: Chunk) -> None:
        self.device.shrink(chunk.full)
        self.ledger.give(Tier.DEVICE, chunk.full_nbytes)
        self._full_bytes -= chunk.full_nbytes

    def mend(self, held: Collection[Chunk]) -> None:
        """Nothing runs: take back what interrupts have left behind.

        A ``KeyboardInterrupt`` comes between any two instructions: between a pin and its being noted, between an
        eviction and the release of its memory. In a notebook training goes on after it.

        Parameters
        ----------
        held
            Chunks that have a pin.
        """
        for chunk in self.chunks:
            chunk.forget_lost_pins(int(chunk in held))
        resident = sum(chunk.full_nbytes for chunk in self.chunks if chunk.is_resident)
        if self._full_bytes != resident:
            for chunk in self.chunks:
                if not (chunk.is_resident or chunk.full_is_home):
                    self.device.shrink(chunk.full)
            self.ledger.give(Tier.DEVICE, self._full_bytes - resident)
            self._full_bytes = resident

    def make_room(self, chunk: Chunk, keep: Sequence[Chunk] = (), overdraw: bool = False) -> None:
        """Evict until ``chunk`` fits.

        What does not fit beside memory that is lent may go beyond the capacity, if the system has as much.

        Raises
        ------
        OutOfMemory
            If it does not fit beside what is in use and what is to be kept.
        """
        while (missing := chunk.full_nbytes - self.ledger.free(Tier.DEVICE)) > 0:
            idle = self._idle(keep)
            if not idle:
                lent = sum(c.full_nbytes for c in self.chunks if c.state is ChunkState.READY and c.is_lent)
                if (overdraw or lent >= missing) and self.headroom() >= missing:
                    self.ledger.overdraw(Tier.DEVICE, missing)
                    return
                raise no_room(self.ledger, self.chunks, chunk, keep)
            self.evict(min(idle, key=lambda c: (c.state is ChunkState.FETCHING, c.last_used)))

    def _evict_for(self, tier: Tier, nbytes: int) -> None:
        """Evict until so many bytes of a tier are free, or nothing idle is left where that would help."""
        if tier is Tier.DISK or self.ledger.bounded_by(tier) is not self.ledger.bounded_by(Tier.DEVICE):
            return
        while self.ledger.free(tier) < nbytes and (idle := self._idle(())):
            self.evict(min(idle, key=lambda c: (c.state is ChunkState.FETCHING, c.last_used)))

    def forget_addresses(self) -> None:
        """Addresses of memory that were given out (``p.data_ptr()``) need not stay valid any longer."""
        for chunk in self.chunks:
            if chunk.loan is not None:
                chunk.loan.forget_address()

    def repay(self) -> None:
        """Give back what went beyond the capacity of DEVICE, as far as nobody holds it."""
        while (overdraft := self.ledger.overdraft(Tier.DEVICE)) > 0:
            idle = self._idle(()) if self.ledger.free(Tier.DEVICE) < overdraft else ()
            if idle:
                self.evict(min(idle, key=lambda c: (c.state is ChunkState.FETCHING, c.last_used)))
            else:
                self.ledger.repay(Tier.DEVICE)
                return

    def evict_idle(self, keep: Sequence[Chunk] = ()) -> None:
        """Free every full copy that nothing uses, but for those of ``keep``."""
        for chunk in self._idle(keep):
            if chunk.state is ChunkState.FETCHING and self._has_failed(chunk):
                continue  # and is freed by that
            self.evict(chunk)

    def _idle(self, keep: Sequence[Chunk]) -> list[Chunk]:
        there = (ChunkState.READY, ChunkState.FETCHING)
        return [c for c in self.chunks if c.state in there and not (c.full_is_home or c in keep or c.is_lent)]

    def _has_failed(self, chunk: Chunk) -> bool:
        """Wait for a move; true if it ran out of memory."""
        try:
            self._arrive(chunk)
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
            return True
        return False

    # -- values

    def read(self, parameter: Tensor, name: str) -> Tensor:
        """A copy, on CPU, of the masters or one state of a parameter (waits for a pending update).

        In the parameter's shape; flat where blocks of elements share a value.
        """
        self.origin.refuse_elsewhere()
        chunk, position = self._places[id(parameter)]
        chunk.settle()
        self.keep_edits(chunk)
        return read_slot(chunk, position, name, self._communicator)

    def write(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """Replace the masters or one state of a parameter; a full copy is dropped, or follows if it is lent."""
        self.origin.refuse_elsewhere()
        chunk, position = self._places[id(parameter)]
        chunk.settle()
        self.keep_assigned(chunk)
        if name == MASTER and chunk.is_resident and not chunk.full_is_home:
            self.evict(chunk)
        write_slot(chunk, position, name, value)
        if name == MASTER:
            chunk.accept(position)
            if chunk.is_lent and not chunk.full_is_home:
                with torch.no_grad():
                    chunk.views[position].copy_(value)
            if chunk.loan is not None:
                chunk.loan.remember(position)

    def settle(self) -> None:
        """Wait for every pending update."""
        for chunk in self.chunks:
            chunk.settle()

    def come_to_rest(self, seconds: float) -> None:
        """Wait until no update and no move is under way, for so long at most. What failed is raised elsewhere."""
        deadline = time.monotonic() + seconds
        for chunk in self.chunks:
            chunk.rest(deadline)

    def close(self) -> None:
        """End worker threads and give the disk file back; the chunks are unusable afterwards. Also for finalizers."""
        for chunk in self.chunks:
            chunk.release()
        self.device.close()
        if self.disk is not None:
            close_in_background(self.disk.close)  # after the threads that use it
