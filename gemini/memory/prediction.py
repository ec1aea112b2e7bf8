"""Predicted and measured peaks of a step on each tier.

Once the warm-up is over the peaks are known beforehand: where homes are (by the placement), which full copies are there
at each moment (by the plan), and what non-model data took at each moment (as the warm-up measured them). Where later
steps take more, something is not as the plan believes: heavier batches, tensors that the training keeps, a plan that is
not followed. Pure.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from ..chunk.memory_map import MemoryMap
from ..chunk.tier import Tier
from ..planning.planner import Plan
from .timeline import Point


class Peaks(NamedTuple):
    """The most bytes of one step."""

    tiers: tuple[int, ...]
    """Bytes in the order of `Tier`; the tier where units run includes non-model data."""
    non_model: int


class Outlook(NamedTuple):
    """The peaks predicted after the warm-up, and the largest measured since."""

    predicted: Peaks
    measured: Peaks

    def after(self, measured: Peaks) -> "Outlook":
        """The outlook with another measured step."""
        tiers = tuple(map(max, self.measured.tiers, measured.tiers))
        return self._replace(measured=Peaks(tiers, max(self.measured.non_model, measured.non_model)))


def predict(homes: Mapping[Tier, int], copies: Sequence[int], non_model: Sequence[int], memory: MemoryMap) -> Peaks:
    """The peaks of a step.

    Parameters
    ----------
    homes
        Bytes of homes and staging on each tier.
    copies, non_model
        Bytes of full copies, and of non-model data, at each moment. Where they are not of the same moments (the plan is
        of another cycle), the peaks of both are taken to come together.
    """
    if len(copies) != len(non_model):
        copies, non_model = [max(copies, default=0)], [max(non_model, default=0)]
    found = dict(homes)
    found[memory.compute_tier] += max((a + b for a, b in zip(copies, non_model, strict=True)), default=0)
    if memory.compute_tier is not Tier.DEVICE:
        found[Tier.DEVICE] = max(copies, default=0)
    return Peaks(tuple(found[tier] for tier in Tier), max(non_model, default=0))


def measure(points: Sequence[Point], where: Tier) -> Peaks:
    """The peaks of a step that was sampled."""
    tiers = []
    for index, tier in enumerate(Tier):
        tiers.append(max((p.used[index] + (p.non_model if tier is where else 0) for p in points), default=0))
    return Peaks(tuple(tiers), max((p.non_model for p in points), default=0))


def bytes_of_copies(plan: Plan, start: Collection[int], nbytes: Mapping[int, int]) -> list[int]:
    """Bytes of the full copies at each moment of a cycle that begins with the chunks ``start``."""
    there = {chunk for chunk in start if chunk in nbytes}
    total = sum(nbytes[chunk] for chunk in there)
    found = []
    for actions in plan.actions:
        gone = there.intersection(actions.evict)
        come = {*actions.fetch, *actions.prefetch}.difference(there - gone)
        there = (there - gone) | come if gone or come else there
        total += sum(nbytes[chunk] for chunk in come) - sum(nbytes[chunk] for chunk in gone)
        found.append(total)
    return found
