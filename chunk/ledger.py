"""How many bytes each tier may hold and holds. Pure; every allocation of ours asks here first."""

from collections.abc import Mapping
from threading import Lock

from gemini.errors import OutOfMemory
from gemini.sizes import format_bytes

from .memory_map import MemoryMap
from .tier import Tier


class Ledger:
    """Used and peak bytes per tier, never above capacity.

    Parameters
    ----------
    capacities
        Bytes each tier may hold; a tier left out holds nothing.
    memory
        Tiers of one pool together must stay within its capacity, and what is reported for the pool includes them all.
    """

    def __init__(self, capacities: Mapping[Tier, int], memory: MemoryMap) -> None:
        self.memory = memory
        self._compute_tier = memory.compute_tier  # asked in each move
        self._capacities = {tier: int(capacities.get(tier, 0)) for tier in Tier}
        self._used = dict.fromkeys(Tier, 0)
        self._peak = dict.fromkeys(Tier, 0)
        self._overdraft = dict.fromkeys(Tier, 0)
        self._peak_overdraft = dict.fromkeys(Tier, 0)
        self._lock = Lock()

    def _pool(self, tier: Tier) -> Tier:
        return self._compute_tier if tier is Tier.DEVICE else tier

    def capacity(self, tier: Tier) -> int:
        return self._capacities[self._pool(tier)]

    def used(self, tier: Tier) -> int:
        with_device = tier is not Tier.DEVICE and tier is self._compute_tier
        return self._used[tier] + self._used[Tier.DEVICE] if with_device else self._used[tier]

    @property
    def ram_bytes(self) -> int:
        """What is used of RAM, an emulated device's included."""
        apart = Tier.DEVICE if self.memory is MemoryMap.EMULATED else None
        return self.used(Tier.HOST) + (0 if apart is None else self.used(apart))

    def peak(self, tier: Tier) -> int:
        return self._peak[tier]

    def counters(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Used, peak and capacity of all tiers, as they are kept, for `read_counters`. Takes half a microsecond."""
        return tuple(self._used.values()), tuple(self._peak.values()), tuple(self._capacities.values())

    def read_counters(
        self, counters: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    ) -> dict[Tier, tuple[int, int, int]]:
        """What `used`, `peak` and `capacity` said of each tier when ``counters`` were taken."""
        used, peak, capacity = (dict(zip(Tier, values, strict=True)) for values in counters)
        if self._compute_tier is Tier.HOST:
            used[Tier.HOST] += used[Tier.DEVICE]
        return {tier: (used[tier], peak[tier], capacity[self._pool(tier)]) for tier in Tier}

    def free(self, tier: Tier) -> int:
        bound = self._pool(tier)
        return self._capacities[bound] + self._overdraft[bound] - self.used(bound)

    def overdraft(self, tier: Tier) -> int:
        """Bytes beyond the capacity that may be used for a while. See `overdraw`."""
        return self._overdraft[self._pool(tier)]

    def overdraw(self, tier: Tier, nbytes: int) -> None:
        """Allow ``nbytes`` more than the capacity, for what code outside of the model's units holds, until `repay`."""
        with self._lock:
            bound = self._pool(tier)
            self._overdraft[bound] += nbytes
            self._peak_overdraft[bound] = max(self._peak_overdraft[bound], self._overdraft[bound])

    def peak_overdraft(self, tier: Tier) -> int:
        """The most that `overdraft` has been."""
        return self._peak_overdraft[self._pool(tier)]

    def repay(self, tier: Tier) -> None:
        """Take back of an overdraft what is not used."""
        with self._lock:
            bound = self._pool(tier)
            self._overdraft[bound] -= max(0, min(self._overdraft[bound], self.free(bound)))

    def take(self, tier: Tier, nbytes: int, what: str) -> None:
        """Count ``nbytes`` as used.

        Raises
        ------
        OutOfMemory
            If the tier would exceed its capacity; nothing is counted then.
        """
        with self._lock:
            free = self.free(tier)
            if nbytes > free:
                bound, enough = self._pool(tier).value, self.capacity(tier) + nbytes - free
                raise OutOfMemory(
                    f"{bound} tier out of memory. {what} needs {format_bytes(nbytes)}, {format_bytes(free)} of "
                    f"{format_bytes(self.capacity(tier))} are free; set {bound}_memory to {enough} bytes "
                    f"({format_bytes(enough)}) or more, a floor: what comes next may need more"
                )
            self._used[tier] += nbytes
            for each in (tier, self._pool(tier)):
                self._peak[each] = max(self._peak[each], self.used(each))

    def give(self, tier: Tier, nbytes: int) -> None:
        """Count ``nbytes`` as free again."""
        with self._lock:
            assert nbytes <= self._used[tier], f"{tier.value}: gave back more than was taken"
            self._used[tier] -= nbytes

    def resize(self, tier: Tier, capacity_bytes: int) -> None:
        """Change a capacity (after warm-up has measured the non-model data). Never below what is used."""
        with self._lock:
            bound = self._pool(tier)
            self._capacities[bound] = max(capacity_bytes, self.used(bound))
