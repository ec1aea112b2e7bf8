"""Where each chunk's homes live. Pure: frozen values in, frozen values out; no torch, no device, no clock.

The floor is what the optimizer keeps: 12 bytes a parameter for Adam (master and both moments, fp32), 4 for plain SGD;
plus the gradient between backward and step (with ``update_in_backward`` room for a few of them, taken off first). The
full copies stream through a ring on DEVICE, whose room is taken off first. What is left is filled fastest tier first:

- DEVICE, where it is memory of its own, takes whole chunks (all buffers together, so that the update runs there);
- HOST takes the masters of all other chunks first, then gradients, then the optimizer's states;
- DISK takes the rest;
- what HOST has left, where DEVICE is memory of its own, takes shadows: fetches then move 2 bytes a parameter, not 4.

Within each, chunks go in the order of their first use. HOST's order is by bytes moved per byte held. A master is read
for each of two fetches and for the update, and written once: 16 bytes moved for 4 held. Gradients and states are
written once and read once: 2 for 1. A shadow of a master on DISK would save two reads of 4 bytes for the 2 it holds, no
more per byte than a master does, and would leave the disk idle in backward; so shadows take only what no home can use.
(Where DEVICE is the same RAM, a full copy that stays is what a shadow would be; the plan keeps as many as have room.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..chunk.names import GRADIENT, MASTER, SHADOW
from ..chunk.tier import Tier

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
    """Its gradient has no home."""

    @property
    def states(self) -> tuple[str, ...]:
        """The buffers that are the optimizer's."""
        return tuple(name for name in self.buffers if name not in (MASTER, GRADIENT))

    def nbytes(self, name: str, tier: Tier) -> int:
        """Bytes that a buffer takes on a tier; DISK gives whole pages."""
        return on_tier(self.shadow_nbytes if name == SHADOW else self.buffers[name], tier)


def on_tier(nbytes: int, tier: Tier) -> int:
    """What so many bytes take there: DISK gives whole pages."""
    return -(-nbytes // DISK_PAGE_BYTES) * DISK_PAGE_BYTES if tier is Tier.DISK else nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What there is."""

    capacities: Mapping[Tier, int]
    """Bytes per tier; DISK is 0 without an offload folder."""
    unified: bool
    """DEVICE and HOST are the same RAM."""
    ring_bytes: int
    """Room for full copies, kept free on DEVICE (on HOST when unified)."""
    staging_bytes: int
    """Room on HOST for the blocks through which DISK homes are read, taken only if there are any."""
    gradient_bytes: int = 0
    """Room for gradients without a home, on each of DEVICE and HOST that has masters of trainable chunks."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision."""

    homes: tuple[Mapping[str, Tier], ...]
    """One per chunk: its buffers, and SHADOW where it has one."""
    nbytes: Mapping[Tier, int]
    """Bytes of homes on each tier."""
    gradient_room: Mapping[Tier, int] = field(default_factory=dict)
    """Bytes for gradients without a home, beside these."""

    @property
    def uses_disk(self) -> bool:
        return self.nbytes[Tier.DISK] > 0


class DoesNotFit(Exception):
    """The tiers are too small.

    Attributes
    ----------
    working_bytes
        What ring and staging exceed their tier by. Only more room on that tier helps.
    homes_bytes
        Homes without a place beside them. That much more room on DISK, or on HOST where there is no disk, is enough.
    missing_bytes
        All together.
    """

    def __init__(self, working_bytes: Mapping[Tier, int], homes_bytes: int) -> None:
        self.working_bytes = working_bytes
        self.homes_bytes = homes_bytes
        self.missing_bytes = homes_bytes + sum(working_bytes.values())
        super().__init__(f"{self.missing_bytes} bytes do not fit")


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


def place(needs: Sequence[ChunkNeed], room: Room, policy: PlacementPolicy) -> Placement:
    """Give every buffer of every chunk a home.

    Parameters
    ----------
    needs
        The chunks, in the order of their first use.

    Raises
    ------
    DoesNotFit
        If the tiers together are too small.
    """
    disk_bytes = room.capacities.get(Tier.DISK, 0)
    try:
        return _fill(needs, room, policy, staging_bytes=0, disk_bytes=0)
    except DoesNotFit:
        if not disk_bytes:
            raise
        return _fill(needs, room, policy, room.staging_bytes, disk_bytes)


def _fill(
    needs: Sequence[ChunkNeed], room: Room, policy: PlacementPolicy, staging_bytes: int, disk_bytes: int
) -> Placement:
    free = {
        Tier.DEVICE: 0 if room.unified else room.capacities[Tier.DEVICE] - room.ring_bytes,
        Tier.HOST: room.capacities[Tier.HOST] - staging_bytes - (room.ring_bytes if room.unified else 0),
        Tier.DISK: disk_bytes,
    }
    working = {tier: -nbytes for tier, nbytes in free.items() if nbytes < 0}
    free = {tier: max(nbytes, 0) for tier, nbytes in free.items()}
    used = dict.fromkeys(Tier, 0)
    homes: list[dict[str, Tier]] = [{} for _ in needs]
    missing = 0

    def put(index: int, name: str, tiers: Sequence[Tier]) -> int:
        for tier in tiers:
            nbytes = needs[index].nbytes(name, tier)
            if nbytes <= free[tier]:
                free[tier] -= nbytes
                used[tier] += nbytes
                homes[index][name] = tier
                return 0
        return needs[index].nbytes(name, Tier.DISK if disk_bytes else Tier.HOST)

    share = policy.device_share(sum(sum(need.buffers.values()) for need in needs))
    gradient_room: dict[Tier, int] = {}
    if room.gradient_bytes and any(need.borrows_gradient for need in needs):
        free[Tier.DEVICE] = max(free[Tier.DEVICE] - room.gradient_bytes, 0)
    for index, need in enumerate(needs):
        whole = sum(need.buffers.values())
        if whole <= free[Tier.DEVICE] and used[Tier.DEVICE] + whole <= share:
            for name in need.buffers:
                put(index, name, (Tier.DEVICE,))
            if need.borrows_gradient:
                gradient_room[Tier.DEVICE] = room.gradient_bytes
    if any(need.borrows_gradient and MASTER not in homes[index] for index, need in enumerate(needs)):
        gradient_room[Tier.HOST] = room.gradient_bytes
        free[Tier.HOST] -= room.gradient_bytes
        if free[Tier.HOST] < 0:
            working[Tier.HOST] = working.get(Tier.HOST, 0) - free[Tier.HOST]
            free[Tier.HOST] = 0
    for index, name in _by_use(needs):
        if name not in homes[index]:
            missing += put(index, name, (Tier.HOST, Tier.DISK))
    if missing or working:
        raise DoesNotFit(working, missing)
    for index, need in enumerate(needs):
        if need.shadow_nbytes and homes[index][MASTER] is Tier.HOST and not room.unified:
            put(index, SHADOW, (Tier.HOST,))
    return Placement(tuple(homes), used, gradient_room)


def _by_use(needs: Sequence[ChunkNeed]) -> Iterator[tuple[int, str]]:
    """All buffers with the index of their chunk, by bytes moved per byte held, most first."""
    for name in (MASTER, GRADIENT):
        yield from ((index, name) for index, need in enumerate(needs) if name in need.buffers)
    for number in range(max((len(need.states) for need in needs), default=0)):
        yield from ((index, need.states[number]) for index, need in enumerate(needs) if number < len(need.states))
