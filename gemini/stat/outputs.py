"""What the commands that look at runs print with ``--json``: the fields of each command's object.

A new field is one line here and the line that fills it; the JSON and its schema follow. Statistics are described in
`gemini.telemetry.statistics` and appear here as whole groups.
"""

from typing import Annotated, Any, Literal

from msgspec import Struct

from gemini.telemetry.records import ByTier, Natural, Phase, TierName
from gemini.telemetry.statistics import (
    Chunks,
    ModelData,
    Moves,
    Needs,
    NonModel,
    Predictions,
    Stalls,
    Uploads,
    doc,
)

ChunkState = Literal["home", "resident", "moving", "in use"]
Status = Literal["running", "stalled", "finished", "crashed", "unknown"]


class Output(Struct):
    """An object, or a part of one."""


class Brief(Output):
    """A run as ``ls`` lists it."""

    run_id: str
    path: str
    name: str
    status: Status
    status_reason: str | None
    pid: Natural | None
    host: str | None
    started_at: float | None
    updated_at: Annotated[float | None, doc("Time of the newest record.")]
    step: Natural | None
    step_seconds: Annotated[float | None, doc("Duration of the last step.")]
    world_size: Natural


class TierState(Output):
    """Model data on a tier."""

    used_bytes: Natural | None
    peak_bytes: Annotated[Natural | None, doc("The highest peak in the records that were read.")]
    capacity_bytes: Natural | None
    used_ratio: float | None


class ProcessMemory(Output):
    """Memory of the process as the system sees it."""

    rss_bytes: Natural | None
    rss_peak_bytes: Annotated[Natural | None, doc("The highest in the records that were read.")]
    free_bytes: Annotated[Natural | None, doc("What the tightest limit leaves to the process.")]
    device_free_bytes: Natural | None
    device_total_bytes: Natural | None
    device_reserved_bytes: Natural | None


Risks = Annotated[
    ByTier[float | None],
    doc("Share of what the process could have that it had at its peak; at 1 memory has run out."),
]


class RankState(Output):
    """One of several ranks."""

    rank: Natural
    host: str | None
    pid: Natural | None
    status: Status
    status_reason: str | None
    tiers: ByTier[TierState]
    oom_risk: Risks
    numbers: Annotated[dict[str, float | None], doc("By the keys of AllRanks.numbers.")]


class Spread(Output):
    """A number over ranks."""

    min: float
    median: float
    max: float
    min_rank: Natural
    max_rank: Natural


class Straggler(Output):
    """The rank with the longest time of its own in a step: without what it waits for others."""

    rank: Natural
    own_seconds: float
    ratio: Annotated[float, doc("To the median over ranks.")]


class AllRanks(Output):
    """All ranks of a run beside each other."""

    numbers: Annotated[
        dict[str, Spread],
        doc(
            "step, step_seconds, own_seconds, wait_seconds, stall_seconds, hit_ratio, model_data_bytes, rss_bytes, "
            "{device,host,disk}_{used,peak}_bytes, non_model_peak_bytes, oom_risk; what is unknown is left out. "
            "Seconds are a step's, of the last ones."
        ),
    ]
    straggler: Straggler | None
    ranks: list[RankState]
    missing: Annotated[list[Natural], doc("They have not begun, or write on other machines.")]


class Snapshot(Brief):
    """A run as plain ``gemini-stat`` shows it; of several ranks in detail the lowest, if no other was asked for."""

    rank: Natural
    tiers: ByTier[TierState]
    chunk: Chunks
    need: Needs
    stall: Stalls
    upload: Uploads
    model_data: ModelData
    non_model: NonModel
    prediction: Predictions
    move: Moves
    device_and_host_are_one: bool | None
    process: ProcessMemory
    oom_risk: Risks
    chunk_map: Annotated[str | None, doc("Run-length encoded, as in the records of type chunks.")]
    dropped_count: Annotated[Natural, doc("Records that were lost.")]
    facts: dict[str, Any]
    summary: dict[str, Any] | None
    all_ranks: Annotated[AllRanks | None, doc("null: one rank is shown by itself.")]


class UnreadableRun(Output):
    path: str
    reason: str


class Listing(Output):
    runs: list[Brief]
    unreadable: Annotated[list[UnreadableRun], doc("Folders with files of a run that cannot be read.")] = []


class Link(Output):
    """Traffic of one direction between tiers."""

    src: TierName
    dst: TierName
    bytes_per_step: float | None
    bytes_per_second: Annotated[float | None, doc("While it was moving.")]
    ceiling_bytes_per_second: Annotated[float | None, doc("What gemini-stat bench measured.")]


class Advice(Output):
    urgent: bool
    text: str
    arguments: Annotated[str | None, doc("Of GeminiPlugin, ready to paste.")]


class Row(Output):
    """A look of ``dmon``; rates are of the steps in a window."""

    t: float
    run_id: str
    rank: Natural
    status: Status
    step: Natural | None
    step_seconds: float | None
    tiers: ByTier[TierState]
    rss_bytes: Natural | None
    non_model_peak_bytes: Natural | None
    oom_risk: Risks
    window_steps: Natural
    hit_ratio: Annotated[float | None, doc("Share of the needs for which the full copy was there in time.")]
    stall_seconds_per_step: float | None
    stall_ratio: Annotated[float | None, doc("Share of a step that is waiting.")]
    links: list[Link]
    advice: list[Advice]
    all_ranks: Annotated[AllRanks | None, doc("null: one rank is shown by itself.")]


class OfRun(Output):
    """What begins the objects that are of one rank of a run."""

    run_id: str
    rank: Natural


class Chunk(Output):
    index: Natural
    numel: Natural
    waste_ratio: float
    home_bytes: Natural
    full_bytes: Natural
    homes: Annotated[dict[str, str], doc("Role to tier, or to host+disk where the home is divided.")]
    group: str
    state: ChunkState | None
    parameters: list[str]


class RankChunks(Output):
    rank: Natural
    map: str
    chunks: list[Chunk]


class ChunkTable(OfRun):
    map: str
    chunks: list[Chunk]
    ranks: Annotated[list[RankChunks], doc("Of each of several ranks.")]


class Moment(Output):
    moment: Natural
    phase: Phase
    unit: str | None
    device_bytes: Natural
    host_bytes: Natural
    disk_bytes: Natural
    non_model_bytes: Natural


class Moments(Output):
    """One step by moment."""

    step: Natural
    tier: Annotated[str, doc("Where units run and non-model data lie.")]
    moment_count: Natural
    peak_moment: Natural
    moments: list[Moment]


class RankPeak(Output):
    """Where a rank's step needs most."""

    rank: Natural
    step: Natural
    peak_bytes: Natural
    phase: Phase
    unit: str | None


class RunMoments(OfRun):
    """The same, with the run that it is of."""

    step: Natural
    tier: str
    moment_count: Natural
    peak_moment: Natural
    moments: list[Moment]
    ranks: Annotated[list[RankPeak], doc("Of each of several ranks, the step recorded last.")]


class Waited(Output):
    reached: bool
    reason: str | None
    run: Brief | None


class Check(Output):
    """A number beside its threshold."""

    name: str
    value: float | None
    limit: float | None
    ok: bool
    text: str
    rank: Annotated[Natural | None, doc("Of several ranks, the one that is nearest to the threshold.")] = None


class Checks(Output):
    run_id: str
    ok: bool
    status: Status
    checks: list[Check]


class Finding(Output):
    name: str
    text: str
    ok: bool
    hint: str | None


class Findings(Output):
    ok: bool
    findings: list[Finding]


FileState = Literal["whole", "no_checksum", "damaged", "unreadable"]


class VerifiedFile(Output):
    """A file of a checkpoint."""

    name: Annotated[str, doc("Relative to the folder of the checkpoint.")]
    nbytes: Annotated[Natural | None, doc("null if it is not there.")]
    state: Annotated[FileState, doc("no_checksum: only its structure was looked at.")]
    text: Annotated[str, doc("What was compared, or what is wrong.")]


class VerifiedCheckpoint(Output):
    """A folder with a checkpoint, or one file."""

    path: str
    state: Annotated[FileState, doc("The worst of its files'.")]
    id: Annotated[str | None, doc("Of the training state in its manifest.")]
    nbytes: Natural
    files: list[VerifiedFile]


class Verification(Output):
    path: str
    ok: Annotated[bool, doc("Nothing is damaged or unreadable.")]
    checkpoints: list[VerifiedCheckpoint]


class Export(OfRun):
    path: str
    bytes: Natural
    ranks: Annotated[list[Natural], doc("Those that are in the file.")]


class Report(OfRun):
    path: str
    bytes: Natural
    charts: bool


class Address(Output):
    address: str
    charts: bool


class Failure(Output):
    code: int
    message: str


class Failed(Output):
    error: Failure
