"""What full copies may take of DEVICE, beside the homes and the non-model data there."""

from collections.abc import Callable

from ..chunk import ChunkManager, Tier
from ..memory.non_model import Batch, NonModelProfile


class DeviceRoom:
    """Resizes the room for full copies: by what non-model data were measured to take, and when these ran out of memory.

    Parameters
    ----------
    manager
        Has the ledger and the chunks.
    limit_bytes
        What model and non-model data may take on DEVICE together: once the latter have been measured, the rest goes to
        full copies. None if the user has set the capacity of DEVICE.
    """

    def __init__(self, manager: ChunkManager, limit_bytes: int | None = None) -> None:
        self.given_up_bytes = 0
        """What full copies no longer take of their capacity since the model's own computation ran out of memory."""
        self._manager = manager
        self._limit_bytes = limit_bytes

    @property
    def full_capacity_bytes(self) -> int:
        """Room for full copies on DEVICE."""
        return self._manager.ledger.free(Tier.DEVICE) + self._manager.full_copies.nbytes

    def is_guessed(self, profile: NonModelProfile) -> bool:
        """True if the capacity is what is left beside a guess: no training step has shown what non-model data take."""
        is_trained = any(chunk.is_trainable for chunk in self._manager.chunks)
        return self._limit_bytes is not None and is_trained and True not in profile.heaviest

    def limit(self, nbytes: int) -> None:
        """Model and non-model data may take less on DEVICE from now on, or more."""
        if self._limit_bytes is not None:
            self._limit_bytes = nbytes
        self.given_up_bytes = 0

    def fit(self, profile: NonModelProfile, batch: Batch, least_bytes: Callable[[], int]) -> bool:
        """Give full copies what non-model data leave of DEVICE, once a training step has shown what they take.

        Parameters
        ----------
        least_bytes
            Tells what full copies need in any case.

        Returns
        -------
        bool
            True if the room is another one now.
        """
        if self._limit_bytes is None or True not in profile.heaviest:
            return False
        expected = profile.expected_peak_bytes(batch) or 0
        peak = max(expected, *(measured.peak_bytes for measured in profile.heaviest.values()))
        ledger = self._manager.ledger
        homes = ledger.capacity(Tier.DEVICE) - self.full_capacity_bytes
        room = max(self._limit_bytes - peak - self.given_up_bytes, homes + least_bytes())
        if room == ledger.capacity(Tier.DEVICE):
            return False
        if room < ledger.used(Tier.DEVICE):
            self._manager.eviction.evict_idle()
        ledger.resize(Tier.DEVICE, room)
        return True

    def give_up(self, held_bytes: int, least_bytes: int) -> bool:
        """Leave more to the model's own computation from now on, which ran out of memory; False if there is no more.

        Half of the full copies that were there may stay, and what one moment needs at least.

        Parameters
        ----------
        held_bytes
            Full copies that were there when it did.
        least_bytes
            What full copies need in any case.
        """
        before = self.full_capacity_bytes
        less = before - min(before, max(held_bytes // 2, least_bytes))
        self._resize(-less)
        self.given_up_bytes += less
        return less > 0

    def take_back(self) -> bool:
        """Give full copies again what they have given up; False if that is nothing."""
        if not self.given_up_bytes:
            return False
        self._resize(self.given_up_bytes)
        self.given_up_bytes = 0
        return True

    def _resize(self, more_bytes: int) -> None:
        ledger = self._manager.ledger
        tier = ledger.memory.compute_tier
        ledger.resize(tier, ledger.capacity(tier) + more_bytes)
