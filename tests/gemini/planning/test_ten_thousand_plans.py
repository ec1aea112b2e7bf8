"""Placement and plan together, on thousands of random models: within every budget, complete, and near the optimum."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from belady import Played, belady, play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemini.chunk import GRADIENT, MASTER, MemoryMap, Tier
from gemini.planning.placement import (
    AutoPlacementPolicy,
    Capacity,
    ChunkNeed,
    Placement,
    PlacementPolicy,
    StaticPlacementPolicy,
    Unplaced,
    place,
)
from gemini.planning.planner import Planner
from gemini.planning.trace import Moment, Phase, Trace

CYCLES = 6
SETTLED = 3
"""The first cycles begin with nothing; what a plan costs in the long run is seen in those after them."""


@dataclass(frozen=True)
class Instance:
    """A random model on a random machine."""

    kind: str
    cycle: list[list[int]]
    """The chunks in use at each moment."""
    needs: list[ChunkNeed]
    room: Capacity
    policy: PlacementPolicy
    depth: int
    equal: bool
    """All chunks have the same size."""
    lost: bool
    """The optimizer step makes the full copies worthless (its kernel does not reach them)."""


def instance_of(seed: int) -> Instance:
    rng = random.Random(seed)
    kind = rng.choice(["training", "training", "checkpointed", "segments", "experts", "evaluation", "anything"])
    cycle, count = cycle_of(kind, rng)
    equal = rng.random() < 0.5
    needs = [need_of(64 if equal else rng.choice([8, 32, 64, 64, 100]), rng.random() < 0.9) for _ in range(count)]
    depth = rng.choice([0, 1, 2, 2, 4])
    copies = [need.full_nbytes for need in needs]
    least = max(sum(copies[c] for c in moment) for moment in cycle)
    ring = min(least + depth * max(copies), sum(copies)) if rng.random() < 0.8 else least
    unified = rng.random() < 0.4
    total = sum(sum(need.buffers.values()) for need in needs)
    disk = total if rng.random() < 0.7 else 0
    if rng.random() < 0.1:  # does not fit, often
        capacities = {Tier.DEVICE: rng.randint(0, ring), Tier.HOST: rng.randint(0, total), Tier.DISK: disk // 2}
    else:
        share = rng.random() if disk else 1.0 + 0.2 * rng.random()
        capacities = {
            Tier.DEVICE: ring + int(rng.random() * rng.choice([sum(copies), total])),
            Tier.HOST: int(total * share) + (ring if unified else 0) + 100,
            Tier.DISK: disk + 4 * 4096 * count,  # homes take whole pages
        }
    room = Capacity(
        nbytes=capacities,
        memory=MemoryMap.UNIFIED if unified else MemoryMap.ACCELERATOR,
        ring_bytes=ring,
        staging_bytes=rng.choice([0, 100]),
    )
    policy = AutoPlacementPolicy() if rng.random() < 0.7 else StaticPlacementPolicy(offload_optim_frac=rng.random())
    return Instance(kind, cycle, needs, room, policy, depth, equal, not unified and rng.random() < 0.5)


def cycle_of(kind: str, rng: random.Random) -> tuple[list[list[int]], int]:
    """The moments of one cycle, and how many chunks there are."""
    if kind == "anything":
        count = rng.randint(1, 12)
        return [rng.sample(range(count), rng.randint(1, min(2, count))) for _ in range(rng.randint(1, 30))], count
    # Units of a few parameters each, packed in order: neighbours share a chunk, and a large one spans several.
    units, place_of_next = [], 0.0
    for _ in range(rng.randint(2, 14)):
        numel = rng.choice([0.3, 0.5, 0.7, 1.0, 1.6])
        units.append(list(range(int(place_of_next), int(place_of_next + numel - 1e-9) + 1)))
        place_of_next += numel
    if rng.random() < 0.4:
        units.append(units[0])  # tied
    if kind == "experts":
        units = [rng.choice(units) if rng.random() < 0.3 else unit for unit in units]
    outer = units[0][:1] if rng.random() < 0.1 else []  # a parameter of the root, in use all the time
    forward = [sorted({*outer, *unit}) for unit in units]
    backward = forward[::-1]
    if kind == "evaluation":
        cycle = forward
    elif kind == "checkpointed":
        cycle = [*forward, *(unit for unit in backward for _ in range(2))]
    elif kind == "segments":
        length = rng.randint(2, 4)
        starts = reversed(range(0, len(forward), length))
        segments = [forward[i : i + length] for i in starts]
        cycle = [*forward, *(unit for segment in segments for unit in (*segment, *segment[::-1]))]
    else:
        cycle = [*forward, *backward]
    return cycle, max(max(moment) for moment in cycle) + 1


def need_of(numel: int, trainable: bool) -> ChunkNeed:
    if not trainable:
        return ChunkNeed(buffers={MASTER: 2 * numel}, full_nbytes=2 * numel)
    states = {MASTER: 4 * numel, "exp_avg": 4 * numel, "exp_avg_sq": 4 * numel}
    return ChunkNeed(buffers={**states, GRADIENT: 2 * numel}, full_nbytes=2 * numel, shadow_nbytes=2 * numel)


def check_placement(instance: Instance, placement: Placement) -> int:
    """No tier holds more than its room; what is left for full copies comes back."""
    room, held = instance.room, Counter[Tier]()
    for need, homes in zip(instance.needs, placement.homes, strict=True):
        assert need.buffers.keys() <= homes.keys()
        for role, where in homes.items():
            for tier, nbytes in need.parts(role, where):
                held[tier] += nbytes
    assert all(held[tier] == placement.nbytes[tier] for tier in Tier)
    host = held[Tier.HOST] + (room.staging_bytes if held[Tier.DISK] else 0)
    assert held[Tier.DISK] <= room.nbytes[Tier.DISK]
    if room.memory is MemoryMap.UNIFIED:
        assert not held[Tier.DEVICE]
        return room.nbytes[Tier.HOST] - host
    assert host <= room.nbytes[Tier.HOST]
    return room.nbytes[Tier.DEVICE] - held[Tier.DEVICE]


def check(seed: int) -> tuple[Instance, Played, list[int]] | None:
    """Place, plan and play an instance; None if it does not fit. With equal chunks, Belady's fetches come along."""
    instance = instance_of(seed)
    placement = place(instance.needs, instance.room, instance.policy)
    if isinstance(placement, Unplaced):
        assert placement.missing_bytes > 0
        return None
    capacity = check_placement(instance, placement)
    nbytes = {
        c: need.full_nbytes
        for c, (need, homes) in enumerate(zip(instance.needs, placement.homes, strict=True))
        if not (instance.room.memory.shares(homes[MASTER], Tier.DEVICE) and "exp_avg" not in need.buffers)
    }
    lost = [c for c in nbytes if instance.lost and "exp_avg" in instance.needs[c].buffers]
    trace = Trace(tuple(Moment(i, Phase.FORWARD, frozenset(m)) for i, m in enumerate(instance.cycle)))
    played = play(
        Planner(trace, nbytes, capacity, instance.depth, lost), nbytes, capacity, instance.depth, CYCLES, lost
    )
    if not instance.equal:
        return instance, played, []
    managed = [[c for c in moment if c in nbytes] for moment in instance.cycle]
    return instance, played, belady(managed, capacity // 128, CYCLES, lost)


def settled(counts: list[int]) -> int:
    return sum(counts[SETTLED:])


def run(first: int, count: int) -> Counter[str]:
    """Check ``count`` instances; sums over those with equal chunks."""
    sums = Counter[str]()

    @settings(deadline=None, max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(first, first + (1 << 40)))
    def check_one(seed: int) -> None:
        result = check(seed)
        sums["instances"] += 1
        if result is None:
            sums["too small"] += 1
            return
        instance, played, optimum = result
        if not optimum:
            return
        fetched, waited, least = settled(played.fetched), settled(played.waited), settled(optimum)
        if instance.depth == 0:
            assert played.fetched == optimum  # reading nothing ahead, the plan is Belady's
        # Reading ahead may take room from what Belady keeps, where that saves as many waits. A few ways are tried; in a
        # few instances of a million none of them costs as little, and then by no more than one a cycle.
        assert fetched + waited <= 2 * least + CYCLES - SETTLED
        kind = "evaluation" if instance.kind in ("evaluation", "anything") else "training"
        sums[f"{kind} fetched"] += fetched
        sums[f"{kind} optimum"] += least
        sums[f"{kind} ahead"] += fetched - waited if instance.depth else 0
        sums[f"{kind} within 2 %"] += fetched <= 1.02 * least
        sums[f"{kind} count"] += 1

    check_one()
    return sums


def check_sums(sums: Counter[str]) -> None:
    print(dict(sums))
    assert sums["too small"] < sums["instances"] / 5
    assert sums["training optimum"] > sums["instances"]  # they stream
    assert sums["training fetched"] <= 1.02 * sums["training optimum"]
    total = {name: sums[f"training {name}"] + sums[f"evaluation {name}"] for name in ("fetched", "optimum")}
    assert total["fetched"] <= 1.02 * total["optimum"]


def test_what_a_plan_costs_at_most_in_an_instance_that_was_worse_than_expected() -> None:
    result = check(17973)
    assert result is not None
    _, played, optimum = result
    assert settled(played.fetched) + settled(played.waited) == 2 * settled(optimum) + 1


def test_random_models_stay_within_their_budgets_and_near_the_optimum() -> None:
    check_sums(run(0, 2_500))


@pytest.mark.heavy
def test_ten_thousand_random_models_do_too() -> None:
    check_sums(run(0, 10_000))


@pytest.mark.heavy
@pytest.mark.timeout(3000)
def test_two_hundred_thousand_random_models_do_too() -> None:
    check_sums(run(1 << 41, 200_000))
