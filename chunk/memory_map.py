"""Which tiers draw from the same memory, and what computes there. Pure: no torch, no device."""

from collections.abc import Mapping
from enum import Enum

from .division import HomeTier
from .tier import Tier


class MemoryMap(Enum):
    """The memory that the tiers of one machine share. All that follows from it is asked here."""

    UNIFIED = "unified"
    """Units run in RAM. DEVICE and HOST are the same RAM under one capacity, HOST's."""

    EMULATED = "emulated"
    """Units run in RAM, of which DEVICE has a capacity of its own, as an accelerator would."""

    ACCELERATOR = "accelerator"
    """Units run in the memory of an accelerator, which the CPU does not write to."""

    def pool(self, tier: Tier) -> Tier:
        """The tier whose capacity bounds this one."""
        return Tier.HOST if self is MemoryMap.UNIFIED and tier is Tier.DEVICE else tier

    @property
    def pools(self) -> tuple[Tier, ...]:
        """The tiers with a capacity of their own, fastest first."""
        return tuple(dict.fromkeys(map(self.pool, Tier)))

    def capacities(self, nbytes: Mapping[Tier, int]) -> dict[Tier, int]:
        """The bytes that bound each tier, where ``nbytes`` has those of each pool."""
        return {tier: nbytes[self.pool(tier)] for tier in Tier}

    @property
    def compute_tier(self) -> Tier:
        """The pool in which units run: full copies and non-model data are there."""
        return self.pool(Tier.DEVICE)

    def shares(self, one: Tier, other: Tier) -> bool:
        """True if both tiers draw from the same pool; units use what shares with DEVICE where it is."""
        return self.pool(one) is self.pool(other)

    def update_reaches_full(self, master: HomeTier) -> bool:
        """True if the update of a master that lies there can write through to the full copy.

        Masters on DEVICE are updated there, all others on the CPU.
        """
        return master is Tier.DEVICE or self is not MemoryMap.ACCELERATOR
