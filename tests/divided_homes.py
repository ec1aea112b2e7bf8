"""Homes that are divided between RAM and disk wherever they can be, at odd places."""

from collections.abc import Sequence
from itertools import count

import pytest

from gemini.boosted import boosted
from gemini.chunk import MASTER, SHADOW, Tier
from gemini.chunk.division import DIVISION_BYTES, Divided, HomeTier
from gemini.packing import solve
from gemini.planning.placement import Capacity, ChunkNeed, Placement, PlacementPolicy, Unplaced, place

ON_TIERS = ("host", "disk")
ROOM = {"chunk_config_dict": {1: {"chunk_size": 1 << 17}}, "offload_dir": "disk", "disk_memory": "64MiB"}
"""Chunks that are long enough to be divided."""


def divide_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide all homes below DEVICE that are long enough, each at another place; RAM has room for all of them.

    A master that units compute with stays whole.
    """
    numbers = count(1)

    def divided(need: ChunkNeed, name: str, where: HomeTier, memory_is_full: bool) -> HomeTier:
        most = (0 if name == SHADOW else need.buffers[name] - 1) // DIVISION_BYTES
        if where is Tier.DEVICE or not most or memory_is_full:
            return where
        return Divided((1 + next(numbers) * 7 % most) * DIVISION_BYTES)

    def place_divided(needs: Sequence[ChunkNeed], capacity: Capacity, policy: PlacementPolicy) -> Placement | Unplaced:
        found = place(needs, capacity, policy)
        if isinstance(found, Unplaced) or not capacity.nbytes[Tier.DISK]:
            return found
        homes = tuple(
            {
                name: divided(need, name, where, name == MASTER and need.computes_with(name, capacity.memory))
                for name, where in at.items()
            }
            for need, at in zip(needs, found.homes, strict=True)
        )
        nbytes = dict.fromkeys(Tier, 0)
        for need, at in zip(needs, homes, strict=True):
            for name, where in at.items():
                for tier, held in need.parts(name, where):
                    nbytes[tier] += held
        return Placement(homes, nbytes, found.gradient_room, found.full_is_home)

    monkeypatch.setattr(solve, "place", place_divided)


def divided_buffers(model: object) -> set[str]:
    """Names of buffers of which a chunk has one in two parts."""
    plans = [chunk.plan for chunk in boosted(model).manager.chunks]  # type: ignore[arg-type]
    return {name for plan in plans for name in plan.tiers if len(plan.parts(name)) == 2}
