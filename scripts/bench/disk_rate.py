"""How fast a disk is for a training, by the disk tier's own code: what benchmarks compare traffic with."""

from pathlib import Path

from gemini.chunk.disk_probe import Probe, Traffic
from gemini.chunk.disk_tuning import measure
from gemini.estimate.disk_bench import BLOCK_BYTES, LANES

SPAN_BYTES = 4 << 30
SECONDS = 10.0
"""Of one measurement at most."""


def mixed_rate(folder: Path, span_bytes: int = SPAN_BYTES, seconds: float = SECONDS) -> float:
    """Bytes a second of reading and writing at once, half of each, around the page cache.

    With the requests that a training on this disk uses, on a file that caches on the way to the disk do not hold and
    that has been written once before, as the homes of a model have been.
    """
    requests = measure(folder, min(span_bytes, 1 << 30))
    with Probe(folder, span_bytes, LANES, BLOCK_BYTES, seconds, requests) as probe:
        return probe.rate(Traffic.MIXED, LANES, BLOCK_BYTES, probe.span_bytes, seconds)
