"""All chunks of a model: moves them, finds a parameter's place, and reads and replaces what lies there."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from torch import Tensor

from gemini.errors import StateError, is_out_of_memory
from gemini.signals import uninterrupted

from .away import Keeper
from .building import ChunkBuilder
from .chunk import Chunk
from .communicator import ALONE, Communicator
from .disk import DiskBackend
from .edits import check_assigned, is_ahead, put, with_edits
from .eviction import Eviction
from .full_copies import FullCopies
from .gradient import GradientBuffer
from .gradient_pool import GradientPool, Use
from .layout import Slot
from .ledger import Ledger
from .memory import DeviceBackend
from .move_counts import MoveCounts
from .names import MASTER
from .origin import Origin
from .plan import ChunkPlan
from .rehoming import Rehoming
from .shortage import refused
from .snapshots import Snapshots
from .state import ChunkState
from .tier import Tier
from .tier_memory import TierMemories
from .together import Together
from .values import last_value, read_slot, write_slot
from .workers import close_in_background


@uninterrupted.in_methods("rebuild", "let_go", "read", "write", "settle", "come_to_rest")
class ChunkManager:
    """Owns the chunks and moves them, within the ledger's capacities.

    Parameters
    ----------
    plans
        One per chunk, in chunk order.
    ledger, device, disk
        The tiers' capacities, and the backends of their memory. ``disk`` may be None if no home is on DISK.
    gradient_room
        Bytes per tier for gradients that have no home.
    headroom
        Bytes that DEVICE has beyond its capacity, as far as the system can tell. What code outside of units holds may
        take of it.
    communicator
        The other owners, where the plans name several.
    snapshot_limit
        Bytes that copies for a snapshot may take; None: see `Snapshots`.

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
        snapshot_limit: int | None = None,
    ) -> None:
        self.ledger = ledger
        self.device = device
        self.disk = disk
        self.full_copies = FullCopies(ledger, device, communicator)
        self.snapshots = Snapshots(self.full_copies, device, ledger, snapshot_limit)
        self.eviction = Eviction(ledger, self.full_copies, headroom, self.snapshots)
        self.access_count = 0
        """Times a visit asked for a full copy: each was there, prefetched, or fetched on demand."""
        self.origin = Origin()
        self._ahead: set[Chunk] = set()
        """Chunks that were fetched ahead of use, and not used since."""
        self.gradient_pool = GradientPool(ledger, device, disk, self.eviction)
        for tier, nbytes in gradient_room.items():
            self.gradient_pool.reserve(tier, nbytes, "room for the gradients of a few chunks")
        memories = TierMemories(ledger, device, disk)
        builder = ChunkBuilder(ledger, device, memories, self.gradient_pool, communicator)
        self.chunks = builder.build(plans)
        self.together = Together(communicator, self.chunks, self.full_copies, self.gradient_pool, device)
        self.rehoming = Rehoming(builder, self.chunks, self.full_copies, self.eviction, self.together)
        self._places: dict[int, tuple[Chunk, int]] = {}

    @property
    def moves(self) -> MoveCounts:
        """What moved since the start."""
        return self.full_copies.counts

    # -- places

    def bind(self, parameter: Tensor, chunk: Chunk, position: int) -> None:
        """Make ``parameter`` live in a slot: its data is its chunk's view from now on, or NaN while that is away."""
        chunk.bind(position, parameter)
        self._places[id(parameter)] = (chunk, position)

    def entrust(self, keeper: Keeper) -> None:
        """Have ``keeper`` answer for parameters while nothing has their chunk pinned."""
        for chunk in self.chunks:
            chunk.bindings.entrust(keeper, partial(last_value, chunk), is_pinned=chunk.pins > 0)

    def release_gradient_after(self, chunk: Chunk, use: Use) -> None:
        """Take back what a chunk has borrowed for its gradient, if it has, once an update is over."""
        if isinstance(chunk.gradient, GradientBuffer) and chunk.gradient.is_borrowed:
            self.gradient_pool.retire(chunk.gradient, use)

    def find(self, parameter: Tensor) -> tuple[Chunk, int] | None:
        """The chunk and the position of a parameter in it, or None if it is not managed."""
        return self._places.get(id(parameter))

    def slot(self, parameter: Tensor) -> Slot:
        chunk, position = self._places[id(parameter)]
        return chunk.layout.slots[position]

    # -- homes

    def rebuild(self, plans: Sequence[ChunkPlan], fill: Callable[[Chunk], None] | None = None) -> None:
        """See `Rehoming.rebuild`. Raises StateError while the model is released."""
        self.refuse_released("give parameters other homes")
        self.snapshots.rest()
        self.rehoming.rebuild(plans, fill)

    def refuse_released(self, doing: str) -> None:
        """Raise if the homes have no memory to work in.

        Raises
        ------
        StateError
            While the model is released.
        """
        if (parking := self.rehoming.parking) is not None:
            raise StateError(
                f"cannot {doing}: the model's memory has been released, and its values are on disk in "
                f"{str(parking.folder)!r}; call booster.resume(model) first"
            )

    def let_go(self, room: Mapping[Chunk, Sequence[Tensor]]) -> None:
        """Have parameters follow their chunks no longer: see `Rehoming.let_go`."""
        self.snapshots.rest()
        self.rehoming.let_go(room)
        self._places.clear()

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
        if chunk.is_resident:
            return
        self.origin.refuse_elsewhere()
        self.refuse_released("use parameters")
        self.full_copies.take_assigned(chunk)
        self.full_copies.reclaim(chunk)
        self.eviction.make_room(chunk, keep, overdraw)
        begin = time.perf_counter()
        try:
            self.full_copies.begin(chunk, background)
        except BaseException as error:
            if background or not is_out_of_memory(error):
                raise
            # The ledger had room, the allocator had not: whatever took it, what nothing uses can go.
            self.eviction.clear(keep)
            try:
                self.full_copies.begin(chunk, background)
            except BaseException as again:
                if not is_out_of_memory(again):
                    raise
                raise refused(self.ledger, tuple(self.full_copies.resident), chunk, again) from again
        self.moves.count_fetch(chunk.full_nbytes, background)
        if background:
            self._ahead.add(chunk)
        else:
            self._ahead.discard(chunk)
            self._count_wait(chunk, begin)

    def pin(self, chunk: Chunk, keep: Sequence[Chunk] = ()) -> None:
        """Wait for the chunk (it must have been fetched) and keep it until `unpin`.

        Where the move, or the update before it, ran out of memory on its way it is made again, in the room of all that
        nothing uses (but for ``keep``).
        """
        self.access_count += 1
        if chunk.state is ChunkState.FETCHING:
            self._arrive(chunk, keep)
        if chunk in self._ahead:
            self.full_copies.counts.count_used()
            self._ahead.discard(chunk)
        if chunk.bindings.is_hidden:  # else the parameters stay where they point, and are looked at before home is
            self.full_copies.take_assigned(chunk)
        if chunk.update is not None:
            self.eviction.settle(chunk, keep)
        chunk.pin()
        self.eviction.note_use(chunk, self.access_count)

    def _arrive(self, chunk: Chunk, keep: Sequence[Chunk]) -> None:
        if chunk in self._ahead and not chunk.has_arrived:
            self.moves.count_late_prefetch()
        begin = time.perf_counter()
        try:
            self.full_copies.arrive(chunk)
            self._count_wait(chunk, begin)
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
            self.eviction.clear(keep)
            self.eviction.settle(chunk, keep)
            self.fetch(chunk, keep)
            self.full_copies.arrive(chunk)

    def evict(self, chunk: Chunk) -> None:
        """See `FullCopies.evict`."""
        self.full_copies.evict(chunk)

    def quiet(self, chunk: Chunk) -> None:
        """See `FullCopies.quiet`: to be called before homes are read, or an update begins."""
        self.full_copies.quiet(chunk)

    def keep_edits(self, chunk: Chunk) -> None:
        """Bring home what was changed in place in a full copy; all owners do so at the same place of the program."""
        edited = ", ".join(chunk.layout.slots[position].name for position in chunk.bindings.edited())
        with self.together.changing(f"an in-place change of {edited}"):
            self.full_copies.bring_home(chunk)

    def check_assigned(self, parameter: Tensor, value: Tensor) -> None:
        """See whether a tensor can be the ``data`` of a parameter; raises ValueError if not."""
        check_assigned(*self._places[id(parameter)], value)

    def assign(self, parameter: Tensor, value: Tensor) -> None:
        """Take over what is assigned to the ``data`` of a parameter whose chunk is pinned. See [Note: Loans]."""
        if value is parameter:
            return
        chunk, position = self._places[id(parameter)]
        value = value.detach()
        if chunk.rounds:
            self.full_copies.put(chunk, position, value)
            return
        is_ours = any(chunk.has_memory(value) for chunk in self.chunks)
        loan = chunk.lend()
        loan.part_with(position)
        with self.together.changing(f"an assignment to the data of {chunk.layout.slots[position].name}"):
            self.full_copies.put(chunk, position, value)
        if not is_ours and value.dtype is chunk.full.dtype:
            loan.adopt(position, value)

    def _count_wait(self, chunk: Chunk, begin: float) -> None:
        self.full_copies.counts.count_wait(chunk.tier, time.perf_counter() - begin)

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
            chunk.mend(int(chunk in held))
        self.full_copies.mend()

    def forget_addresses(self) -> None:
        """Addresses of memory that were given out (``p.data_ptr()``) need not stay valid any longer."""
        for chunk in self.chunks:
            if chunk.loan is not None:
                chunk.loan.forget_address()

    # -- values

    def read(self, parameter: Tensor, name: str) -> Tensor:
        """A copy, on CPU, of the masters or one state of a parameter (waits for a pending update).

        In the parameter's shape; flat where blocks of elements share a value.
        """
        self.origin.refuse_elsewhere()
        chunk, position = self._places[id(parameter)]
        self.quiet(chunk)
        values = read_slot(chunk, position, name, self.together.communicator)
        return with_edits(chunk, position, values) if name == MASTER and is_ahead(chunk) else values

    def write(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """Replace the masters or one state of a parameter; a full copy is dropped, or follows if it is lent."""
        self.origin.refuse_elsewhere()
        chunk, position = self._places[id(parameter)]
        chunk.settle()
        self.full_copies.take_assigned(chunk)
        with self.together.changing(f"a change of {name} of {chunk.layout.slots[position].name}"):
            if name == MASTER:
                if chunk.is_resident:
                    self.full_copies.bring_home(chunk)
                    self.evict(chunk)
                put(chunk, position, value)
            else:
                write_slot(chunk, position, name, value)

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
        self.snapshots.close()
        for chunk in self.chunks:
            chunk.bindings.release()
        self.full_copies.close()
        self.device.close()
        for disk in (self.disk, self.rehoming.parking):
            if disk is not None:
                close_in_background(disk.close)  # after the threads that use it
