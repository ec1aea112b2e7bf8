"""What the commands of `gemini.estimate` print with ``--json``; here, because the schema is printed without torch."""

from typing import Annotated, Literal

from msgspec import Meta

from gemini.stat.outputs import OfRun, Output
from gemini.telemetry.records import ByTier, Natural, TierUse
from gemini.telemetry.statistics import doc


class DiskBench(Output):
    """How the disk was measured."""

    folder: str
    file_system: str
    is_direct: Annotated[bool, doc("Around the page cache.")]
    request_bytes: Natural
    depth: Annotated[Natural, doc("Requests at once.")]
    file_bytes: Natural
    rounds: Annotated[dict[str, list[float]], doc("Bytes per second by link, of each round.")]
    remembered_in: Annotated[
        str, doc("File from which trainings on this file system learn size and depth of requests.")
    ]
    remarks: list[str]


class Bench(Output):
    host: str
    measured_at: float
    bytes_per_second: Annotated[dict[str, float], doc("By link, such as host_to_device.")]
    adam_elements_per_second: float
    flops_per_second: Annotated[float, doc("Of products of matrices in bf16.")]
    disk: DiskBench | None = None
    training_flops_per_second: Annotated[
        float | None, doc("Of forward and backward of a small GPT in bf16, six operations a parameter and token.")
    ] = None


class TierNeed(Output):
    model_bytes: Natural
    non_model_bytes: Natural
    peak_bytes: Natural
    capacity_bytes: Natural | None
    fits: bool


class Solved(Output):
    what: Literal["batch-size", "seq-len", "host", "disk", "ranks"]
    value: Annotated[Natural | None, doc("0 or null: nothing fits.")]


class Estimate(Output):
    """What a training will need."""

    model: str
    fits: bool
    parameters: Natural
    batch_size: Natural
    seq_len: Natural
    precision: str
    optimizer: str
    checkpointing: bool
    activation_policy: Annotated[str, doc("What becomes of tensors saved for backward.")]
    non_model_bytes: Natural
    ranks: Annotated[Natural, doc("That keep the model together.")]
    ranks_per_node: Annotated[Natural, doc("On the machine that has most of them.")]
    nodes: Annotated[Natural, doc("Machines.")]
    tiers: Annotated[ByTier[TierNeed], doc("Of each rank.")]
    node_tiers: Annotated[ByTier[TierNeed], doc("Of all ranks of a machine; of device what their accelerators have.")]
    device_and_host_are_one: bool
    terms: Annotated[dict[str, int], doc("Bytes of model data by kind.")]
    arguments: Annotated[str | None, doc("Of GeminiPlugin, ready to paste.")]
    step_seconds_floor: Annotated[float | None, doc("What waits for what included; null if not all was measured.")]
    step_seconds_floor_by: Annotated[
        dict[str, float],
        doc("Computing, optimizer, uploading, disk; and waiting: what computing stands still for the disk."),
    ]
    solved: Solved | None
    problem: str | None
    remarks: list[str]


class Holder(Output):
    what: str
    bytes: Natural


class Change(Output):
    """A change with which memory would have been enough."""

    text: str
    arguments: str | None
    verified: bool
    verified_by: Literal["estimate", "packing"] | None
    batch_size: Annotated[int, Meta(ge=1)] | None
    seq_len: Annotated[int, Meta(ge=1)] | None
    checkpointing: bool | None
    ram_bytes: Natural | None


class Explanation(OfRun):
    """What there was when memory ran out."""

    error: str | None
    phase: str | None
    unit: str | None
    tiers: ByTier[TierUse]
    holders: list[Holder]
    changes: list[Change]
    not_estimated: Annotated[str | None, doc("Why the estimate verified nothing.")]
