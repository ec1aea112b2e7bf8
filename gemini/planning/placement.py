"""Where each chunk's homes live. Pure: frozen values in, frozen values out; no torch, no device, no clock.

The floor is what the optimizer keeps: 12 bytes a parameter for Adam (master and both moments, fp32), 4 for plain SGD;
plus the gradient between backward and step (with ``update_in_backward`` room for a few of them, taken off first). The
full copies stream through a ring in the pool where units run, whose room is taken off first. What is left of the pools
is filled fastest first:

- DEVICE, where it is a pool of its own, takes whole chunks (all buffers together, so that the update runs there);
- HOST takes the buffers of all other chunks in the order below for as long as there is room, and the first part of the
  one that does not fit (`Divided`); the rest goes to DISK;
- what HOST has left, where units do not run there, takes shadows: fetches then move 2 bytes a parameter, not 4.

HOST's order is by bytes moved per byte held, and then by time. All that an update changes is read and written once: 2
for 1; a gradient is written and read. A master is also read for each of two fetches, unless there is room for most full
copies to stay: 4 for 1. Homes that move equally often go chunk by chunk, in the order of first use. The first chunks'
gradients are complete last, and the next forward waits for their updates first (of a tied embedding both are so), while
the streams of later chunks hide behind the forward, and behind backward: an update can begin there where all that it
changes is on disk. Within a chunk the master comes first, which is read again should its copy have to leave.
``scripts/bench placement`` simulates what that is worth.

A shadow of a master on DISK would save two reads of 4 bytes for the 2 it holds, no more per byte than a master does,
and would leave the disk idle in backward; so shadows take only what no home can use. (Where DEVICE is the same RAM, a
full copy that stays is what a shadow would be; the plan keeps as many as have room.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..chunk.division import DIVISION_BYTES, Divided, HomeTier, parts
from ..chunk.memory_map import MemoryMap
from ..chunk.names import ABSMAX, GRADIENT, MASTER, SHADOW
from ..chunk.tier import Tier

STAYING_SHARE = 0.75
"""Of all full copies: with room for less, masters that are fetched again cost more than what hides saves."""
DISK_PAGE_BYTES = 4096
"""The disk tier's unit (`chunk.disk.PAGE_BYTES`; not imported, because that needs torch)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkNeed:
    """What one chunk asks for."""

    buffers: Mapping[str, int]
    """Bytes of each buffer that it has: the master, the gradient if that has a home, and the optimizer's states."""
    full_nbytes: int
    """Bytes of its full copy."""
    shadow_nbytes: int = 0
    """Bytes of the master in the compute dtype; 0 where that is the master's own."""
    borrows_gradient: bool = False
    """Its gradient has no home; or it has one for the sum of several owners, once backward is over."""
    full_can_be_home: bool = False
    """Units can compute with its master, if that is where they run."""

    @property
    def home_nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self.buffers.values())

    @property
    def is_trained(self) -> bool:
        """True if an update changes it."""
        return GRADIENT in self.buffers or self.borrows_gradient

    def moves(self, name: str, memory: MemoryMap, copies_stay: bool) -> int:
        """How many times a step moves the bytes of a buffer if that is on DISK."""
        if name not in (MASTER, ABSMAX):
            return 2
        # What units compute with takes no room for a full copy either.
        return 2 * (self.is_trained + (not copies_stay) + self.computes_with(name, memory))

    def computes_with(self, name: str, memory: MemoryMap) -> bool:
        """True if units compute with this buffer where it is on HOST, and so with all of it."""
        return self.full_can_be_home and name == MASTER and memory.shares(Tier.HOST, Tier.DEVICE)

    def parts(self, name: str, where: HomeTier) -> tuple[tuple[Tier, int], ...]:
        """The tiers that a buffer takes room on there, and the bytes; DISK gives whole pages."""
        nbytes = self.shadow_nbytes if name == SHADOW else self.buffers[name]
        return tuple((tier, on_tier(held, tier)) for tier, held in parts(where, nbytes))


def on_tier(nbytes: int, tier: Tier) -> int:
    """Bytes that a buffer of ``nbytes`` takes on a tier; DISK gives whole pages."""
    return -(-nbytes // DISK_PAGE_BYTES) * DISK_PAGE_BYTES if tier is Tier.DISK else nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The bytes that tiers have, and what is kept free of homes."""

    nbytes: Mapping[Tier, int]
    """Bytes per tier; DISK is 0 without an offload folder."""
    memory: MemoryMap
    ring_bytes: int = 0
    """Room for full copies, kept free where units run."""
    staging_bytes: int = 0
    """Room on HOST for the blocks through which DISK homes are read, taken only if there are any."""
    gradient_bytes: int = 0
    """Room for gradients without a home, on each of DEVICE and HOST that has masters of trainable chunks."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Homes that fit."""

    homes: tuple[Mapping[str, HomeTier], ...]
    """One per chunk: its buffers, and SHADOW where it has one."""
    nbytes: Mapping[Tier, int]
    """Bytes of homes on each tier."""
    gradient_room: Mapping[Tier, int] = field(default_factory=dict)
    """Bytes for gradients without a home, beside these."""
    full_is_home: tuple[bool, ...] = ()
    """For each chunk: units run where its master is and compute with it, so that it has no other full copy."""

    @property
    def uses_disk(self) -> bool:
        return self.nbytes[Tier.DISK] > 0


@dataclass(frozen=True, slots=True)
class Unplaced:
    """What the tiers are too small for."""

    working_bytes: Mapping[Tier, int]
    """What ring, staging and gradients without a home exceed their tier by. Only more room on that tier helps."""
    homes_bytes: int
    """Homes without a place beside them. That much more room on DISK, or on HOST where there is no disk, is enough."""

    @property
    def missing_bytes(self) -> int:
        """Both together."""
        return self.homes_bytes + sum(self.working_bytes.values())


@dataclass(frozen=True, slots=True)
class AutoPlacementPolicy:
    """Fill DEVICE, then HOST, then DISK."""

    def device_share(self, total_bytes: int) -> int:
        """Bytes of homes wanted on DEVICE at most."""
        return total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPlacementPolicy:
    """Keep a fixed fraction of the homes off DEVICE.

    The fractions are of bytes, exact to one chunk.
    """

    offload_optim_frac: float = 0.0
    """Share of the homes (masters, moments, gradients) that live on HOST or DISK."""
    offload_param_frac: float = 0.0
    """Share of the full copies that do not stay on DEVICE between uses."""

    def __post_init__(self) -> None:
        for name in ("offload_optim_frac", "offload_param_frac"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")

    def device_share(self, total_bytes: int) -> int:
        return round(total_bytes * (1.0 - self.offload_optim_frac))


PlacementPolicy = AutoPlacementPolicy | StaticPlacementPolicy


def place(needs: Sequence[ChunkNeed], capacity: Capacity, policy: PlacementPolicy) -> Placement | Unplaced:
    """Give every buffer of every chunk a home.

    Parameters
    ----------
    needs
        The chunks, in the order of their first use.
    """
    pools = capacity.memory.pools
    found = _fill(needs, capacity, policy, tuple(tier for tier in pools if tier is not Tier.DISK))
    if isinstance(found, Unplaced) and capacity.nbytes.get(Tier.DISK, 0):
        return _fill(needs, capacity, policy, pools)
    return found


def _fill(
    needs: Sequence[ChunkNeed], capacity: Capacity, policy: PlacementPolicy, tiers: Sequence[Tier]
) -> Placement | Unplaced:
    """Fill tiers, fastest first."""
    memory, free, used = capacity.memory, {tier: capacity.nbytes[tier] for tier in tiers}, dict.fromkeys(Tier, 0)
    homes: list[dict[str, HomeTier]] = [{} for _ in needs]
    working: dict[Tier, int] = {}
    gradient_room: dict[Tier, int] = {}

    def keep_free(tier: Tier, nbytes: int) -> None:
        lacking = nbytes - free[tier]
        free[tier] = max(-lacking, 0)
        if lacking > 0:
            working[tier] = working.get(tier, 0) + lacking

    def put(index: int, name: str, tiers: Sequence[Tier]) -> int:
        """Give a buffer a home on the first tier with room for it; return the bytes without one, if there is none."""
        for where in _places(needs[index], name, tiers, free, memory):
            taken = needs[index].parts(name, where)
            if all(nbytes <= free[tier] for tier, nbytes in taken):
                for tier, nbytes in taken:
                    free[tier] -= nbytes
                    used[tier] += nbytes
                homes[index][name] = where
                return 0
        return sum(nbytes for _, nbytes in taken)

    keep_free(memory.compute_tier, capacity.ring_bytes)
    if Tier.DISK in tiers:
        keep_free(Tier.HOST, capacity.staging_bytes)
    borrowers = {index for index, need in enumerate(needs) if need.borrows_gradient}
    whole, below = [t for t in tiers if t is Tier.DEVICE], [t for t in tiers if t is not Tier.DEVICE]
    for tier in whole:
        free[tier] = max(free[tier] - (capacity.gradient_bytes if borrowers else 0), 0)
        share = policy.device_share(sum(need.home_nbytes for need in needs))
        for index, need in enumerate(needs):
            if need.home_nbytes <= min(free[tier], share - used[tier]):
                for name in need.buffers:
                    put(index, name, whole)
                if index in borrowers:
                    gradient_room[tier] = capacity.gradient_bytes
    rest = [(index, need) for index, need in enumerate(needs) if not homes[index]]
    if any(need.borrows_gradient for _, need in rest):
        gradient_room[below[0]] = capacity.gradient_bytes
        keep_free(below[0], capacity.gradient_bytes)
    missing = sum(put(index, name, below) for index, name in _in_order(rest, capacity))
    if missing or working:
        return Unplaced(working, missing)
    for index, need in rest:
        if need.shadow_nbytes and homes[index][MASTER] is Tier.HOST and memory.compute_tier is not Tier.HOST:
            put(index, SHADOW, (Tier.HOST,))
    full_is_home = tuple(
        need.full_can_be_home and _is_on_device(memory, at[MASTER]) for need, at in zip(needs, homes, strict=True)
    )
    return Placement(tuple(homes), used, gradient_room, full_is_home)


def _in_order(needs: Sequence[tuple[int, ChunkNeed]], capacity: Capacity) -> list[tuple[int, str]]:
    """Buffers (with the index of their chunk) as they get the faster tier."""
    memory = capacity.memory
    # An accelerator's copies are dropped by updates, which the CPU runs, and fetched again.
    copies_bytes = sum(need.full_nbytes for _, need in needs)
    copies_stay = memory.update_reaches_full(Tier.HOST) and capacity.ring_bytes >= STAYING_SHARE * copies_bytes
    buffers = [
        (index, need, name) for index, need in needs for name in sorted(need.buffers, key=lambda name: name == GRADIENT)
    ]
    return [(i, name) for i, need, name in sorted(buffers, key=lambda b: -b[1].moves(b[2], memory, copies_stay))]


def _places(
    need: ChunkNeed, name: str, tiers: Sequence[Tier], free: Mapping[Tier, int], memory: MemoryMap
) -> Iterator[HomeTier]:
    """Where a buffer may lie, best first: on a tier, or on HOST as far as there is room and the rest on DISK."""
    for tier in tiers:
        if tier is Tier.DISK and Tier.HOST in tiers and not need.computes_with(name, memory):
            if room := free[Tier.HOST] // DIVISION_BYTES * DIVISION_BYTES:
                yield Divided(room)
        yield tier


def _is_on_device(memory: MemoryMap, where: HomeTier) -> bool:
    return not isinstance(where, Divided) and memory.shares(where, Tier.DEVICE)
