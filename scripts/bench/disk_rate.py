"""How fast a disk is for a training, by the disk tier's own code: what benchmarks compare traffic with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemini.chunk.disk_probe import Probe, Traffic
from gemini.chunk.disk_tuning import measure
from gemini.estimate.disk_bench import BLOCK_BYTES, LANES

SPAN_BYTES = 4 << 30
SECONDS = 10.0
"""Of one measurement at most."""
MOMENT_BYTES = 512 << 20
"""What is moved to see how fast a disk is just now: shared ones change by half within a minute."""


@contextmanager
def mixed_rates(
    folder: Path, span_bytes: int = SPAN_BYTES, seconds: float = SECONDS, moment_bytes: int = MOMENT_BYTES
) -> Iterator[Callable[[], float]]:
    """What tells each time it is called how many bytes a second a disk reads and writes now, half of each at once.

    Around the page cache, with the requests that a training on this disk uses, on a file that caches on the way to the
    disk do not hold and that has been written once before, as the homes of a model have been.
    """
    requests = measure(folder, min(span_bytes, 1 << 30))
    with Probe(folder, span_bytes, LANES, BLOCK_BYTES, seconds, requests) as probe:
        nbytes = min(moment_bytes, probe.span_bytes)
        yield lambda: probe.rate(Traffic.MIXED, LANES, BLOCK_BYTES, nbytes, seconds)


def mixed_rate(folder: Path, span_bytes: int = SPAN_BYTES, seconds: float = SECONDS) -> float:
    """The rate over a whole file: see `mixed_rates`."""
    with mixed_rates(folder, span_bytes, seconds, span_bytes) as measure_now:
        return measure_now()
