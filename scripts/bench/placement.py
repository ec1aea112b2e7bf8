"""Which homes should RAM have: steps of a GPT simulated (`gemini.planning.step_time`) for orders of filling it.

Units compute in RAM, masters are fp32, full copies and gradients bf16. Rates, and seconds a step computes, are
arguments; nothing is trained. ``rule`` is what `gemini.planning.placement.place` does.
"""

import argparse
from collections.abc import Mapping, Sequence

from gemini.chunk.division import HomeTier, parts
from gemini.chunk.memory_map import MemoryMap
from gemini.chunk.names import GRADIENT, MASTER
from gemini.chunk.tier import Tier
from gemini.planning.placement import AutoPlacementPolicy, Capacity, ChunkNeed, Placement, place
from gemini.planning.step_time import Begin, ChunkTraffic, DiskRates, Order, Step, Visit, step_time

MIB = 1 << 20
STATES = ("exp_avg", "exp_avg_sq")
OnDisk = Sequence[Mapping[str, int]]
"""Bytes of each chunk's buffers."""


def chunk_numels(layers: int, hidden: int, vocabulary: int, tied: bool) -> list[int]:
    """The embedding, a chunk a layer, and the head if it is not the embedding."""
    return [vocabulary * hidden, *[12 * hidden**2] * layers, *([] if tied else [vocabulary * hidden])]


def needs_of(numels: Sequence[int]) -> list[ChunkNeed]:
    """What the chunks ask for, in the order of their first use."""
    return [
        ChunkNeed(buffers={MASTER: 4 * n, **dict.fromkeys(STATES, 4 * n), GRADIENT: 2 * n}, full_nbytes=2 * n)
        for n in numels
    ]


def by_rule(needs: Sequence[ChunkNeed], homes_bytes: int, copies_bytes: int) -> OnDisk:
    """What is on disk where RAM has this room for homes and for full copies."""
    nbytes = {Tier.DEVICE: 0, Tier.HOST: homes_bytes + copies_bytes, Tier.DISK: 1 << 50}
    capacity = Capacity(nbytes=nbytes, memory=MemoryMap.UNIFIED, ring_bytes=copies_bytes)
    found = place(needs, capacity, AutoPlacementPolicy())
    assert isinstance(found, Placement)

    def on_disk(where: HomeTier, held: int) -> int:
        return sum(part for tier, part in parts(where, held) if tier is Tier.DISK)

    pairs = zip(needs, found.homes, strict=True)
    return [{name: on_disk(at[name], held) for name, held in need.buffers.items()} for need, at in pairs]


def by_order(needs: Sequence[ChunkNeed], homes_bytes: int, order: Sequence[tuple[int, str]], divides: bool) -> OnDisk:
    """The same if RAM takes buffers in this order, and of one that does not fit the first part or nothing."""
    found = [dict(need.buffers) for need in needs]
    for index, name in order:
        taken = min(homes_bytes, found[index][name])
        if divides or taken == found[index][name]:
            homes_bytes -= taken
            found[index][name] -= taken
    return found


def orders(count: int) -> dict[str, list[tuple[int, str]]]:
    """Ways to fill RAM."""
    names, states = (MASTER, *STATES, GRADIENT), [*STATES]
    return {
        "by kind": [(i, name) for name in (MASTER, GRADIENT, *states) for i in range(count)],
        "last first": [(i, name) for i in reversed(range(count)) for name in names],
        "tied last": [(i, name) for i in (*range(1, count), 0) for name in names],
        "gradient first": [(i, name) for i in range(count) for name in (GRADIENT, MASTER, *states)],
    }


def step_of(
    numels: Sequence[int], on_disk: OnDisk, seconds: float, tied: bool, begin: Begin, fetched: float = 0.0
) -> Step:
    """A step; ``fetched`` is the share of full copies for which there is no room to stay.

    An embedding computes nothing where it is looked up; forward takes a third of the time. An update begins in backward
    only where all that it changes is on disk, beside which its results are kept until the step confirms them.
    """
    heads = [0] if tied else [len(numels) - 1]
    layers = range(1, len(numels) - (not tied))
    of = seconds / 3 / sum(numels[i] for i in (*layers, *heads))
    visits = [(0, 0.0), *((i, of * numels[i]) for i in (*layers, *heads))]

    def visit(index: int, took: float) -> Visit:
        return Visit(chunks=(index,), seconds=took, fetched=(index,) if fetched else ())

    kept = (MASTER, *STATES)
    wholes = [sum(need.buffers[name] for name in kept) for need in needs_of(numels)]
    is_ahead = begin is Begin.WHEN_COMPLETE
    wholly_on_disk = (i for i, held in enumerate(on_disk) if sum(held[name] for name in kept) >= wholes[i])
    early = frozenset(wholly_on_disk if is_ahead else ())
    chunks = {}
    for index, held in enumerate(on_disk):
        updated = sum(held[name] for name in kept)
        chunks[index] = ChunkTraffic(
            fetch_bytes=round(held[MASTER] * fetched),
            update_read_bytes=updated,
            update_written_bytes=updated,
            gradient_bytes=held[GRADIENT],
        )
    return Step(
        forward=tuple(visit(index, took) for index, took in visits),
        backward=tuple(visit(index, 2 * took) for index, took in reversed(visits)),
        chunks=chunks,
        order=Order(updates=tuple(range(len(numels))), early=early),
    )


def compared(
    numels: Sequence[int], homes_bytes: int, seconds: float, rate: float, tied: bool, begin: Begin, stay: float = 1.0
) -> dict[str, float]:
    """Seconds of a step by the way that RAM was filled; there is room for this share of the full copies."""
    needs, disk = needs_of(numels), DiskRates(read=rate, write=rate, mixed=rate)
    found: dict[str, OnDisk] = {"rule": by_rule(needs, homes_bytes, int(sum(n.full_nbytes for n in needs) * stay))}
    for name, order in orders(len(needs)).items():
        found[name] = by_order(needs, homes_bytes, order, divides=True)
    found["by kind, whole"] = by_order(needs, homes_bytes, orders(len(needs))["by kind"], divides=False)
    steps = {name: step_of(numels, on_disk, seconds, tied, begin, 1.0 - stay) for name, on_disk in found.items()}
    return {name: step_time(step, disk).seconds for name, step in steps.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--seconds", type=float, default=1.25, help="that a step computes")
    parser.add_argument("--rate", type=float, default=1.8, help="of the disk, GB/s, mixed")
    parser.add_argument("--homes", type=int, nargs="+", default=[20, 106, 300, 600], help="MiB of RAM for homes")


def run(options: argparse.Namespace) -> dict[str, object]:
    rows: list[dict[str, object]] = []
    table: list[dict[str, str]] = []
    for tied in (True, False):
        numels = chunk_numels(options.layers, options.hidden, options.vocabulary, tied)
        for homes in options.homes:
            for begin in Begin:
                for stay in (1.0, 0.75, 0.5):
                    found = compared(numels, homes * MIB, options.seconds, options.rate * 1e9, tied, begin, stay)
                    rows.append({"tied": tied, "homes_mib": homes, "begin": begin.value, "stay": stay, **found})
                    setting = {
                        "head": "tied" if tied else "untied",
                        "homes MiB": f"{homes}",
                        "updates": begin.value,
                        "stay": f"{stay:.0%}",
                    }
                    table.append({**setting, **{name: f"{took:.2f}" for name, took in found.items()}})
    return {"table": table, "rows": rows}
