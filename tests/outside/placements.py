"""Where the model data of managed runs are, and what may be refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemini.booster.plugin import GeminiPlugin


@dataclass(frozen=True)
class Refusal:
    """An error that a use must end with, before it has changed anything."""

    error: type[BaseException] | tuple[type[BaseException], ...]
    way_out: str
    """A pattern of the part of the message that says what to do instead."""
    is_torchs: bool = False
    """The error is torch's own: loud, and nothing of ours can be told from the call."""

    def fits(self, error: BaseException) -> bool:
        """Whether ``error`` is this refusal; torch's own errors don't speak of chunks or boosting."""
        message = str(error)
        is_known = self.is_torchs or re.search(r"boost|chunk|kept on", message) is not None
        return is_known and isinstance(error, self.error) and re.search(self.way_out, message) is not None


ROOM_FOR_DISK = 300 << 10
"""Bytes of RAM through which chunks come from disk and go there, besides room for one of them."""

ELSEWHERE = Refusal(RuntimeError, r"p\.grad.*kept on (disk|cpu).*(clip_grad_by_norm|host_memory)")
"""A gradient that has no memory where its parameter is cannot be shown in ``p.grad``."""


@dataclass(frozen=True)
class Placement:
    """Where the model data of a managed run are."""

    name: str
    device_share: float | None = None
    """Room for full copies, as a part of the weights' bytes; none: full copies have all the room they need."""
    host_weights: float | None = None
    """Room for homes in RAM, in multiples of the weights' (and gradients') bytes; none: all homes are in RAM."""
    device: str = "cpu"
    """Where batches go."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `GeminiPlugin`."""
    refusal: Refusal | None = None
    """An error with which uses of gradients may end here."""
    topics: tuple[str, ...] | None = None
    """The topics that are worth a run here; all of them if none is named."""

    def plugin(self, model: Any, folder: str) -> GeminiPlugin:
        weights = sum(p.nbytes for p in model.parameters())
        largest = max(p.nbytes for p in model.parameters())
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        options: dict[str, Any] = {
            "chunk_config_dict": {1: {"chunk_size": 256}},
            "host_memory": "64MiB",
            **self.options,
        }
        if self.device_share is not None:
            options["device_memory"] = int(weights * self.device_share)
        if self.host_weights is not None:
            options["host_memory"] = ROOM_FOR_DISK + largest + int(self.host_weights * (weights + gradients))
            options["offload_dir"] = folder
        return GeminiPlugin(precision="fp32", telemetry=False, **options)

    def check(self, model: Any) -> None:
        """Fail if this model's chunks don't have to move."""
        stats = model.memory_stats()
        assert self.device_share is None or stats["move/evict_count"], (
            "nothing was evicted: this placement shows nothing"
        )
        assert self.host_weights is None or stats["disk/used_bytes"], "nothing is on disk: this placement shows nothing"


ON_SEVERAL_TIERS = ("gradients", "states", "trainings")
"""Topics in which homes of several kinds matter, not only the weights'."""

PLACEMENTS = {
    placement.name: placement
    for placement in (
        Placement("roomy"),  # full copies are homes
        Placement("tight", device_share=0.35),  # full copies move
        Placement("disk", host_weights=0.0, refusal=ELSEWHERE),  # all homes are on disk, gradients too
        # Moments are on disk, and some gradients.
        Placement("mixed", device_share=0.35, host_weights=1.0, topics=ON_SEVERAL_TIERS, refusal=ELSEWHERE),
    )
}

SIMULATED = {
    placement.name: placement
    for placement in (
        Placement("device", device="sim", topics=("gradients",)),  # homes are on the device
        Placement("offloaded", device="sim", device_share=0.35, refusal=ELSEWHERE),  # copies move, homes are in RAM
    )
}
"""Placements on the simulated accelerator, for a process in which it is registered."""
