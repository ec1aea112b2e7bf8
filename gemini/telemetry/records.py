"""What a run writes: the fields of each record and of each document beside the records.

A new field is one line here and the line that measures it; encoding, decoding and the JSON Schema follow. It needs a
default, because older versions wrote none. A field that is `UNSET` is not written.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

from gemini.telemetry.layout import TIERS
from gemini.telemetry.statistics import doc, gauge

T = TypeVar("T")

EndStatus = Literal["finished", "crashed"]
Phase = Literal["forward", "backward", "end"]
PHASES: Mapping[str, Phase] = {"f": "forward", "b": "backward", "e": "end"}
PLAIN_ROLES = ("master", "master_low", "absmax", "gradient", "shadow")
"""Roles of homes that are not states of the optimizer."""

Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""A count or a number of bytes. It fits 63 bits, so that nothing that computes with it can overflow."""
TierName = Annotated[str, Meta(pattern=f"^({'|'.join(TIERS)})$")]
ByTier = Annotated[dict[TierName, T], Meta(min_length=len(TIERS), extra_json_schema={"required": list(TIERS)})]
"""One value for each tier."""
States = Annotated[
    str,
    Meta(
        pattern="^([0-9]+[dhkDHK>*])*$",
        description=(
            "Run-length encoded, in chunk order: home tier (d, h, k for disk), upper case where the full copy is on "
            "the device, > on its way, * in use."
        ),
    ),
]


class Fields(Struct):
    """Fields of a record or of a part of one."""


class DocumentHeader(Fields):
    v: Annotated[Literal[1], doc("Major version; raised when a field goes or changes its meaning.")]
    t: Annotated[float, doc("Seconds since the epoch.")]
    rank: Natural


class Header(DocumentHeader):
    type: str
    dropped: Annotated[Natural, doc("Records lost so far because the thread could not keep up.")]


class Start(Fields):
    """Begins each file of records."""

    run_id: str
    name: Annotated[str, doc("The script.")]
    pid: Natural
    host: str
    world_size: Natural
    started: Annotated[float, doc("Seconds since the epoch.")]
    restart: Annotated[Natural, doc("How often torchrun on this machine has started it anew.")]
    attempt: Annotated[str, doc("The same for all ranks that were started together, after a restart another one.")] = ""


class Step(Fields):
    stats: Annotated[
        Mapping[Annotated[str, Meta(pattern="^[a-z_]+/[a-z_]+$")], float | None],
        doc("The flat keys of model.memory_stats(); bytes, seconds and counts are totals since boost."),
    ]


class Timeline(Fields):
    """One step by moment; all columns have one length."""

    step: Natural
    tier: Annotated[
        Literal["device", "host"],
        doc("Where units run and non-model data lie; host where that is the same RAM as the device."),
    ]
    moment_count: Annotated[Natural, doc("Moments of the step, before neighbours were pooled.")]
    peak_moment: Annotated[Natural, doc("The moment with the most bytes, before pooling.")]
    unit: Annotated[list[int], doc("Index into the units of the description; others: the step's end.")]
    phase: Annotated[str, Meta(pattern="^[fbe]*$", description="A letter a moment: forward, backward, end.")]
    device_bytes: list[Natural]
    host_bytes: list[Natural]
    disk_bytes: list[Natural]
    non_model_bytes: list[Natural]

    def __post_init__(self) -> None:
        columns = (self.unit, self.device_bytes, self.host_bytes, self.disk_bytes, self.non_model_bytes)
        if not self.phase or any(len(column) != len(self.phase) for column in columns):
            raise ValueError("expected columns of one length, at least 1")

    @property
    def model_bytes(self) -> Sequence[int]:
        """Bytes of model data on the tier where units run."""
        return self.host_bytes if self.tier == "host" else self.device_bytes

    @property
    def total_bytes(self) -> list[int]:
        """All bytes on the tier where units run."""
        return [used + other for used, other in zip(self.model_bytes, self.non_model_bytes, strict=True)]

    @property
    def peak(self) -> int:
        """The moment with the most bytes, of those that are left after pooling."""
        total = self.total_bytes
        return max(range(len(total)), key=total.__getitem__)


class ChunkMap(Fields):
    """The chunks' tiers and states."""

    states: States


class Process(Fields):
    """Memory of the process as the system sees it."""

    rss_bytes: Annotated[Natural, gauge("process_resident_bytes", "RAM of the process.")]
    free_bytes: Annotated[Natural, gauge("process_free_bytes", "RAM that the tightest limit leaves to the process.")]
    limit: Annotated[str, doc("What that limit is.")]
    device_free_bytes: Annotated[Natural | UnsetType, doc("Free on the accelerator.")] = UNSET
    device_total_bytes: Annotated[Natural | UnsetType, doc("Memory of the accelerator.")] = UNSET
    device_reserved_bytes: Annotated[Natural | UnsetType, doc("Held by the allocator of this process.")] = UNSET


class TierUse(Fields):
    used_bytes: Natural
    peak_bytes: Natural
    capacity_bytes: Natural


class OutOfMemory(Fields, kw_only=True):
    """An out-of-memory error, and what there was at that moment."""

    error: str
    is_ours: Annotated[bool, doc("Raised by gemini-memory, not by an allocator.")]
    unit: Annotated[str | None, doc("The innermost unit that was running.")]
    phase: Literal["forward", "backward"]
    tiers: ByTier[TierUse]
    non_model_peak_bytes: Natural
    moments_before: Annotated[Timeline | None, doc("The step that failed, up to the error.")]
    states: States
    in_use: Annotated[list[Natural], doc("Indices of chunks that units were using.")]
    process: Process
    batch_shapes: Annotated[list[list[Natural]], doc("Of the tensors of the batch.")] = []


class OutOfMemoryDocument(OutOfMemory, kw_only=True):
    last_timeline: Annotated[Timeline | None, doc("The last whole step that was recorded by moment.")]


class End(Fields):
    status: EndStatus
    summary: dict[str, Any] | None
    error: str | None


class DescribedChunk(Fields):
    """One chunk as `boost` built it."""

    numel: Natural
    used_numel: Annotated[Natural, doc("Elements that are no padding.")]
    full_bytes: Annotated[Natural, doc("Of its full copy.")]
    homes: Annotated[dict[str, str], doc("Role to tier, or to host+disk where the home is divided.")]
    home_bytes: Annotated[dict[str, Natural], doc("Role to bytes.")]
    group: str
    extent: Annotated[
        list[Natural] | None,
        doc("First element that is at home with this rank, and the one after the last; null: all."),
    ] = None

    @property
    def kept_numel(self) -> int:
        """Elements that are at home with this rank."""
        return self.numel if self.extent is None or len(self.extent) != 2 else self.extent[1] - self.extent[0]

    @property
    def states(self) -> Sequence[str]:
        """Roles that are states of the optimizer, by the optimizer's own words."""
        return [role for role in self.homes if role not in PLAIN_ROLES]


class DescribedParameter(Fields):
    name: str
    shape: list[Natural]
    chunk: Natural
    param_group: Annotated[int, doc("-1: in no group of the optimizer.")]
    trainable: bool
    keeps_fp32: bool


class Capacity(Fields):
    bytes: Natural
    source: str


class Description(Fields):
    """Chunks, units and parameters, to which records refer by index, and all that the packing was decided by."""

    chunks: list[DescribedChunk]
    parameters: list[DescribedParameter]
    units: list[str]
    homes_bytes: ByTier[Natural]
    capacities: ByTier[Capacity]
    unified: Annotated[bool, doc("Device and host are one RAM.")]
    config: dict[str, Any]
    ram_bytes: Annotated[Natural, doc("Left by the limit on RAM before the training; 0: not known.")] = 0
    device_limit_bytes: Annotated[
        Natural | None, doc("What model and other data may take of the accelerator; null: not known.")
    ] = None
    model: Annotated[
        dict[str, Any] | None, doc("Class and configuration of a model of transformers; null for others.")
    ] = None

    def names_by_chunk(self) -> list[list[str]]:
        """Names of the parameters in each chunk."""
        found: list[list[str]] = [[] for _ in self.chunks]
        for parameter in self.parameters:
            if parameter.chunk < len(found):
                found[parameter.chunk].append(parameter.name)
        return found


RECORDS: Mapping[str, type[Fields]] = {
    "start": Start,
    "step": Step,
    "timeline": Timeline,
    "chunks": ChunkMap,
    "process": Process,
    "oom": OutOfMemory,
    "end": End,
}
"""By ``type``."""
DOCUMENTS: Mapping[str, type[Fields]] = {
    "timeline_file": Timeline,
    "oom_file": OutOfMemoryDocument,
    "chunks_file": Description,
}
"""By name in the schema."""
