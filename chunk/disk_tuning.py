"""How many requests of which size a disk is fastest with: a short measurement, remembered per file system.

Network disks and arrays want many requests at once, one spinning disk wants few and large ones, and no table of ours
would know the next one. What is measured is what the stream of updates does: reading and writing at once, around the
page cache. Each combination is measured in several rounds, in another order each time, and of those that are as good as
the best to within what rounds differ by, the one with the fewest requests is taken: so the same disk gets the same
answer, although no two measurements are alike. It takes one second or two, once; whatever goes wrong in it, training
goes on with numbers that are good enough for most.
"""

import logging
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .disk_file import Requests
from .disk_memory import DiskMemory
from .disk_probe import Probe, Traffic

DEFAULT = Requests(nbytes=1 << 20, depth=4)
LEAST_TIER_BYTES = 256 << 20
"""A smaller tier is over before a measurement pays."""
SIZES = (1 << 18, 1 << 20, 1 << 22)
DEPTHS = (2, 4, 8)
COMBINATIONS = tuple(Requests(nbytes, depth) for depth in DEPTHS for nbytes in SIZES)
SPAN_BYTES = 256 << 20
PASS_BYTES = 32 << 20
PASS_SECONDS = 0.06
"""One measurement of one combination ends after as many bytes or seconds."""
ROUNDS = 5
BUDGET_SECONDS = 3.0
"""No round begins after that; one that has begun then ends, and counts for nothing if another one is whole."""
LEAST_TOLERANCE, MOST_TOLERANCE = 0.15, 0.3
"""Rates that differ by less are the same, at least and at most; between, it is what the rounds differ by."""

logger = logging.getLogger(__name__)


def tuned(folder: Path, tier_bytes: int, memory: Path) -> Requests:
    """What to ask of the disk of ``folder`` for a tier of this size. Never fails.

    Parameters
    ----------
    memory
        Folder that remembers what was measured.
    """
    if tier_bytes < LEAST_TIER_BYTES:
        return Requests()
    try:
        known = DiskMemory(folder, memory)
        with known.alone():  # several ranks begin at once: one measures, the others read what it found
            return known.load(COMBINATIONS) or known.store(measure(folder))
    except Exception as error:  # a full or failing disk will say so itself, where it matters
        logger.info("the disk of %s cannot be measured (%s); using the default", folder, error)
        return DEFAULT


def measure(
    folder: Path, span_bytes: int = SPAN_BYTES, rounds: int = ROUNDS, seconds: float = BUDGET_SECONDS
) -> Requests:
    """Move blocks of a scratch file with each combination, in rounds until the time is up, and take the best.

    Raises
    ------
    OffloadError
        If the folder cannot be used, or has no room.
    """
    deadline = time.monotonic() + seconds
    with Probe(folder, span_bytes, max(DEPTHS) + 1, max(SIZES), seconds / 6) as probe:
        found: list[dict[Requests, float]] = []
        for number in range(rounds):
            rates: dict[Requests, float] = {}
            for one in random.Random(number).sample(COMBINATIONS, len(COMBINATIONS)):
                if time.monotonic() < deadline:
                    # Those that the disk is given at once, and the one of the thread that asks.
                    rates[one] = probe.rate(Traffic.MIXED, one.depth + 1, one.nbytes, PASS_BYTES, PASS_SECONDS)
            found.append(rates)
    best = choose([rates for rates in found if len(rates) == len(COMBINATIONS)] or found[:1])
    logger.info("disk of %s: %d requests of %d bytes at once", folder, best.depth, best.nbytes)
    return best


def choose(rounds: Sequence[Mapping[Requests, float]]) -> Requests:
    """The fewest requests, then the largest, among those as fast as the best. Pure.

    Parameters
    ----------
    rounds
        The rate of each combination; all have the same ones.
    """
    rates = {one: [found[one] for found in rounds] for one in rounds[0]} if rounds else {}
    if not rates:
        return DEFAULT
    middle = {one: statistics.median(found) for one, found in rates.items()}
    noise = statistics.median((max(found) - min(found)) / max(middle[one], 1e-9) for one, found in rates.items())
    enough = max(middle.values()) * (1 - min(max(noise, LEAST_TOLERANCE), MOST_TOLERANCE))
    return min((one for one, rate in middle.items() if rate >= enough), key=lambda one: (one.depth, -one.nbytes))
