"""What moved between tiers since the start."""

from dataclasses import dataclass, field

from .tier import Tier


@dataclass(slots=True)
class MoveCounts:
    """Full copies that were asked for, fetched and evicted."""

    fetch_count: int = 0
    fetch_bytes: int = 0
    miss_count: int = 0
    """Fetches that a unit had to ask for itself, because nothing had prefetched them."""
    prefetch_count: int = 0
    prefetch_used: int = 0
    late_prefetch_count: int = 0
    """Prefetched full copies that had not arrived when they were needed."""
    evict_count: int = 0
    waited_seconds: dict[Tier, float] = field(default_factory=lambda: dict.fromkeys(Tier, 0.0))
    """What visits waited for full copies, by the tier that these came from."""

    def count_fetch(self, nbytes: int, is_prefetch: bool) -> None:
        self.fetch_count += 1
        self.fetch_bytes += nbytes
        self.prefetch_count += is_prefetch
        self.miss_count += not is_prefetch

    def count_late_prefetch(self) -> None:
        self.late_prefetch_count += 1

    def count_used(self) -> None:
        """What was fetched ahead is used for the first time."""
        self.prefetch_used += 1

    def count_eviction(self) -> None:
        self.evict_count += 1

    def count_wait(self, tier: Tier, seconds: float) -> None:
        self.waited_seconds[tier] += seconds
