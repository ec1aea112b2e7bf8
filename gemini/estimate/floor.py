"""The least time a step can take: what must be computed and moved, by what this machine was measured to do. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one step."""

    flops: float
    adam_elements: int
    disk_read_bytes: int
    disk_write_bytes: int
    upload_bytes: int
    """Into full copies, from RAM."""


def seconds(work: Work, speed: Mapping[str, float]) -> dict[str, float]:
    """Seconds by what does it; the step takes at least the longest, since all of it may overlap.

    What was not measured is left out.
    """
    needs = {
        "computing": (work.flops, "flops_per_second"),
        "optimizer": (work.adam_elements, "adam_elements_per_second"),
        "reading disk": (work.disk_read_bytes, "disk_to_host"),
        "writing disk": (work.disk_write_bytes, "host_to_disk"),
        "uploading": (work.upload_bytes, "host_to_device"),
    }
    return {name: amount / speed[key] for name, (amount, key) in needs.items() if amount and speed.get(key)}
