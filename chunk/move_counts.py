"""What moved between tiers since the start."""

from dataclasses import dataclass, field

from .tier import Tier


@dataclass(slots=True)
class MoveCounts:
    """Full copies that were asked for, fetched and evicted."""

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

    def count_need(self) -> int:
        """A visit asks for a full copy. Returns the number of the request."""
        self.need_count += 1
        return self.need_count

    def count_fetch(self, nbytes: int, is_prefetch: bool) -> None:
        self.fetch_count += 1
        self.fetch_bytes += nbytes
        self.prefetch_count += is_prefetch
        self.demand_count += not is_prefetch

    def count_late(self) -> None:
        self.late_count += 1

    def count_used(self) -> None:
        """What was fetched ahead is used for the first time."""
        self.prefetch_used += 1

    def count_eviction(self) -> None:
        self.evict_count += 1

    def count_wait(self, tier: Tier, seconds: float) -> None:
        self.waited_seconds[tier] += seconds
