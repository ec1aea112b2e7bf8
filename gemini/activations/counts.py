"""What has become of saved tensors, in numbers."""

from dataclasses import dataclass

from ..chunk import Tier


@dataclass(slots=True)
class ActivationCounts:
    """Totals since `boost`. Changed by the threads that train, read by any."""

    saved_bytes: int = 0
    """Of storages that could leave."""
    leave_count: int = 0
    leave_bytes: int = 0
    return_count: int = 0
    return_bytes: int = 0
    hit_count: int = 0
    """Storages that were there when backward came to them."""
    late_count: int = 0
    """Storages that were on their way."""
    miss_count: int = 0
    """Storages that had to be asked for."""
    switch_count: int = 0
    """1 once memory has run out and not everything is kept any more."""
    refuse_count: int = 0
    """Storages that stayed because there was no room below, or because writing failed."""
    leave_wait_seconds: float = 0.0
    """Time that forwards waited for memory to leave."""
    return_wait_seconds: float = 0.0
    """Time that backwards waited for memory to come back."""
    host_bytes: int = 0
    """Taken on HOST now."""
    disk_bytes: int = 0
    """Taken on DISK now."""
    below_peak_bytes: int = 0
    """The most taken on both."""

    def saved(self, nbytes: int) -> None:
        """A graph holds a storage that may leave."""
        self.saved_bytes += nbytes

    def switched(self) -> None:
        """What forwards save is no longer kept as ever."""
        self.switch_count += 1

    def leaves(self, nbytes: int) -> None:
        """A storage is on its way to a tier below."""
        self.leave_count += 1
        self.leave_bytes += nbytes

    def stays(self) -> None:
        """A storage stays for good."""
        self.refuse_count += 1

    def returns(self, nbytes: int) -> None:
        """A storage is on its way back."""
        self.return_count += 1
        self.return_bytes += nbytes

    def needed(self, *, hit: int = 0, late: int = 0, miss: int = 0) -> None:
        """Backward has come to a storage."""
        self.hit_count += hit
        self.late_count += late
        self.miss_count += miss

    def waited(self, *, to_leave: float = 0.0, to_return: float = 0.0) -> None:
        """Seconds that training has waited."""
        self.leave_wait_seconds += to_leave
        self.return_wait_seconds += to_return

    def takes(self, tier: Tier, nbytes: int) -> None:
        """Room on a tier below is taken, or given back if ``nbytes`` is negative."""
        if tier is Tier.HOST:
            self.host_bytes += nbytes
        else:
            self.disk_bytes += nbytes
        self.below_peak_bytes = max(self.below_peak_bytes, self.host_bytes + self.disk_bytes)
