"""The table of statistics: every key of ``model.memory_stats()``, what it means, and the metric that shows it.

A new statistic is one line here and the line in `gemini.monitor.stats` that measures it. JSON output, its schema, the
schema of step records and the Prometheus metrics follow from the table.

A field of a group is the statistic ``"<group>/<field>"``. Its name ends in its unit: ``_bytes``, ``_seconds``,
``_count`` or ``_ratio``. Bytes, seconds and counts of moves, needs, stalls and uploads are totals since ``boost``.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from msgspec import Meta, Struct
from msgspec.structs import fields

Whole = int | None
Real = float | None


class Family(NamedTuple):
    """A Prometheus metric: one number of a rank, or one for each value of a label."""

    name: str
    help: str
    kind: Literal["gauge", "counter"]
    label: str | None = None

    def sample(self, text: str, value: str | None = None) -> Meta:
        """Describe a field that is a sample of this metric; the label's value is by default the field's group."""
        return Meta(description=text, extra={"sample": (self, value)})


def gauge(name: str, text: str) -> Meta:
    """Describe a field that is a metric by itself, a number that goes up and down."""
    return Family(name, text, "gauge").sample(text)


def counter(name: str, text: str) -> Meta:
    """Describe a field that is a metric by itself, a total that only grows."""
    return Family(name, text, "counter").sample(text)


def doc(description: str) -> Meta:
    """Describe a field that is no metric."""
    return Meta(description=description)


USED = Family("tier_used_bytes", "Model data there now.", "gauge", "tier")
PEAK = Family("tier_peak_bytes", "The most model data so far.", "gauge", "tier")
CAPACITY = Family("tier_capacity_bytes", "What they may take.", "gauge", "tier")
HOMES = Family("chunk_homes", "Chunks whose home is there.", "gauge", "tier")
NEEDS = Family("needs", "Times a unit needed a chunk, by whether it was there.", "counter", "outcome")
WAITS = Family("wait_seconds", "Time that units waited for chunks of a tier.", "counter", "tier")
UPLOADS = Family("upload_bytes", "Bytes of full copies, by the tier they came from.", "counter", "tier")

RETURNS = Family(
    "activation_needs", "Times backward needed saved memory, by whether it was there.", "counter", "outcome"
)
BELOW = Family("activation_below_bytes", "Saved memory that is below the tier that computes.", "gauge", "tier")
ACTIVATION_WAITS = Family("activation_wait_seconds", "Time that saved memory was waited for.", "counter", "way")


class Group(Struct):
    """Statistics whose keys begin with the same word; None is unknown."""


class TierStatistics(Group):
    """Model data on a tier. Where device and host are one RAM, host counts both and device only the full copies."""

    used_bytes: Annotated[Whole, USED.sample("Bytes of model data now.")]
    peak_bytes: Annotated[Whole, PEAK.sample("The most since boost or since the peaks were reset.")]
    capacity_bytes: Annotated[Whole, CAPACITY.sample("Bytes that model data may take.")]


class DeviceStatistics(TierStatistics):
    overdraft_peak_bytes: Annotated[Whole, doc("The most that full copies took beyond the capacity.")]


class Memory(Group):
    unified: Annotated[Whole, doc("1 where device and host are one RAM, else 0.")]


class Chunks(Group):
    """Chunks and the tiers of their masters."""

    count: Annotated[Whole, gauge("chunks", "Chunks of the model.")]
    numel: Annotated[Whole, doc("Elements of the largest chunk.")]
    waste_ratio: Annotated[Real, doc("Share of all elements that is padding.")]
    device_count: Annotated[Whole, HOMES.sample("Chunks whose master is on the device.", "device")]
    host_count: Annotated[Whole, HOMES.sample("Chunks whose master is on the host.", "host")]
    disk_count: Annotated[Whole, HOMES.sample("Chunks whose master is on disk.", "disk")]
    resident_count: Annotated[Whole, gauge("chunk_copies", "Full copies on the device now.")]


class Placement(Group):
    """What the arguments of these names came to."""

    offload_optim_frac: Annotated[Real, doc("Share of the bytes of homes that lies off the tier where units run.")]
    offload_param_frac: Annotated[Real, doc("Share of the full copies for which there is no room to stay.")]


class ModelData(Group):
    """Bytes of model data at home on all tiers."""

    total_bytes: Annotated[Whole, doc("Parameters, gradients and optimizer states.")]
    parameter_bytes: Annotated[Whole, doc("Masters.")]
    gradient_bytes: Annotated[Whole, doc("Gradients.")]
    optimizer_bytes: Annotated[Whole, doc("States of the optimizer.")]


class ModelDataAndShadows(ModelData):
    shadow_bytes: Annotated[Whole, doc("bf16 copies that lie beside fp32 masters.")]


class Needs(Group):
    """How often a unit needed a chunk, and whether it had to wait for the full copy."""

    count: Annotated[Whole, doc("Times in all.")]
    resident_count: Annotated[Whole, NEEDS.sample("Times the full copy had stayed.", "resident")]
    hit_count: Annotated[Whole, NEEDS.sample("Times it was prefetched in time.", "hit")]
    late_count: Annotated[Whole, NEEDS.sample("Times it was prefetched and still on its way.", "late")]
    miss_count: Annotated[Whole, NEEDS.sample("Times it was fetched on demand.", "miss")]


class Moves(Group):
    """Full copies made and dropped, and the traffic of the disk tier."""

    fetch_count: Annotated[Whole, counter("fetches", "Full copies that were made.")]
    fetch_bytes: Annotated[Whole, doc("Bytes of full copies that were made.")]
    prefetch_count: Annotated[Whole, doc("Full copies that were made ahead.")]
    prefetch_hit_ratio: Annotated[Real, doc("Share of the fetches that were prefetches and used.")]
    evict_count: Annotated[Whole, counter("evictions", "Full copies that were dropped.")]
    disk_read_bytes: Annotated[Whole, counter("disk_read_bytes", "Bytes read from the disk tier.")]
    disk_write_bytes: Annotated[Whole, counter("disk_written_bytes", "Bytes written to the disk tier.")]
    disk_read_seconds: Annotated[Real, doc("Time of reads from the disk tier.")]
    disk_write_seconds: Annotated[Real, doc("Time of writes to the disk tier.")]
    stall_seconds: Annotated[Real, counter("stall_seconds", "Time that units waited for their chunks.")]


class Stalls(Group):
    """Time that units waited for full copies of chunks at home on a tier."""

    device_seconds: Annotated[Real, WAITS.sample("Of chunks at home on the device.", "device")]
    host_seconds: Annotated[Real, WAITS.sample("Of chunks at home on the host.", "host")]
    disk_seconds: Annotated[Real, WAITS.sample("Of chunks at home on disk.", "disk")]


class Uploads(Group):
    """Bytes of full copies and the time to make them, by the tier that they came from."""

    device_bytes: Annotated[Whole, UPLOADS.sample("Bytes from the device.", "device")]
    device_seconds: Annotated[Real, doc("Time of copies from the device.")]
    host_bytes: Annotated[Whole, UPLOADS.sample("Bytes from the host.", "host")]
    host_seconds: Annotated[Real, doc("Time of copies from the host.")]
    disk_bytes: Annotated[Whole, UPLOADS.sample("Bytes from disk.", "disk")]
    disk_seconds: Annotated[Real, doc("Time of copies from disk.")]


class Activations(Group):
    """Storages of tensors saved for backward that could leave the memory that computes, and what became of them."""

    saved_bytes: Annotated[Whole, doc("Bytes that graphs have saved and that could leave.")]
    leave_count: Annotated[Whole, counter("activations_left", "Storages that left for a tier below.")]
    leave_bytes: Annotated[Whole, counter("activation_left_bytes", "Bytes that left for a tier below.")]
    return_count: Annotated[Whole, counter("activations_returned", "Storages that came back.")]
    return_bytes: Annotated[Whole, counter("activation_returned_bytes", "Bytes that came back.")]
    hit_count: Annotated[Whole, RETURNS.sample("Times one was there when backward needed it.", "hit")]
    late_count: Annotated[Whole, RETURNS.sample("Times one was still on its way.", "late")]
    miss_count: Annotated[Whole, RETURNS.sample("Times one had to be asked for.", "miss")]
    switch_count: Annotated[Whole, doc("1 once memory ran out and activation_policy=None has become 'auto'.")]
    refuse_count: Annotated[Whole, doc("Storages that stayed because there was no room below, or writing failed.")]
    leave_wait_seconds: Annotated[Real, ACTIVATION_WAITS.sample("Time that forward waited for some to leave.", "leave")]
    return_wait_seconds: Annotated[
        Real, ACTIVATION_WAITS.sample("Time that backward waited for some to return.", "return")
    ]
    host_bytes: Annotated[Whole, BELOW.sample("Bytes on the host now.", "host")]
    disk_bytes: Annotated[Whole, BELOW.sample("Bytes on disk now.", "disk")]
    below_peak_bytes: Annotated[Whole, doc("The most on the host and on disk together so far.")]


class NonModel(Group):
    peak_bytes: Annotated[Whole, gauge("non_model_peak_bytes", "The most activations and temporaries so far.")]


class Predictions(Group):
    """Peak bytes of a step as predicted after the warm-up, and the most that later steps were measured to take."""

    device_predicted_bytes: Annotated[Whole, doc("Model data on the device, predicted.")]
    device_measured_bytes: Annotated[Whole, doc("Model data on the device, measured.")]
    host_predicted_bytes: Annotated[Whole, doc("Model data on the host, predicted.")]
    host_measured_bytes: Annotated[Whole, doc("Model data on the host, measured.")]
    disk_predicted_bytes: Annotated[Whole, doc("Model data on disk, predicted.")]
    disk_measured_bytes: Annotated[Whole, doc("Model data on disk, measured.")]
    non_model_predicted_bytes: Annotated[Whole, doc("Non-model data, predicted.")]
    non_model_measured_bytes: Annotated[Whole, doc("Non-model data, measured.")]


class Steps(Group):
    count: Annotated[Whole, counter("steps", "Optimizer steps.")]
    seconds: Annotated[Real, gauge("last_step_seconds", "Duration of the last step.")]
    skipped_count: Annotated[Whole, counter("skipped_steps", "Steps skipped because a gradient overflowed.")]
    loss_scale: Annotated[Real, doc("Scale of the loss in fp16.")]
    grad_norm: Annotated[Real, doc("Norm of all gradients, where it was asked for.")]
    wait_seconds: Annotated[
        Real, gauge("last_step_rank_wait_seconds", "How much of the last step was waiting for other ranks.")
    ]


GROUPS: Mapping[str, type[Group]] = {
    "step": Steps,
    "device": DeviceStatistics,
    "host": TierStatistics,
    "disk": TierStatistics,
    "memory": Memory,
    "chunk": Chunks,
    "placement": Placement,
    "model_data": ModelDataAndShadows,
    "activation": Activations,
    "non_model": NonModel,
    "need": Needs,
    "move": Moves,
    "stall": Stalls,
    "upload": Uploads,
    "prediction": Predictions,
}


class Statistic(NamedTuple):
    """One line of the table."""

    key: str
    field: str
    text: str
    is_whole: bool
    sample: tuple[Family, str] | None
    """The metric that shows it, and the value of the metric's label."""

    def of(self, stats: Mapping[str, float]) -> int | float | None:
        value = stats.get(self.key)
        return None if value is None else int(value) if self.is_whole else float(value)


@cache
def lines_of(name: str, group: type[Struct]) -> tuple[Statistic, ...]:
    """The lines of the table that a group's fields are."""
    return tuple(_line(name, field.name, field.type) for field in fields(group))


def _line(group: str, name: str, annotated: Any) -> Statistic:
    kind, *_, meta = get_args(annotated)
    family, value = (meta.extra or {}).get("sample", (None, None))
    sample = None if family is None else (family, value or group)
    return Statistic(f"{group}/{name}", name, meta.description, int in get_args(kind), sample)


def table() -> Iterator[Statistic]:
    """Every statistic there is."""
    for name, group in GROUPS.items():
        yield from lines_of(name, group)


G = TypeVar("G", bound=Group)


def group_of(name: str, group: type[G], stats: Mapping[str, float]) -> G:
    """The statistics of a group out of the flat ones."""
    return group(**{line.field: line.of(stats) for line in lines_of(name, group)})
