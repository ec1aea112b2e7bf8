"""A run's numbers as Prometheus metrics: a custom collector that reads the newest records at each scrape.

Never prometheus_client's multiprocess mode, which leaves files behind for every process that dies. No chunk, unit or
parameter is a label: a label's values must stay few.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from gemini.stat.rates import risk
from gemini.telemetry.reader import TIERS, RunStatus, RunView

PREFIX = "gemini_memory"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NAME_LENGTH = 120


class RunCollector:
    """What prometheus_client asks at each scrape.

    Parameters
    ----------
    look
        Reads the runs (each rank is one) now.
    """

    def __init__(self, look: Callable[[], Iterable[RunView]]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        runs = list(self._look())
        yield from _state(runs)
        yield from _tiers(runs)
        yield from _counters(runs)
        yield from _process(runs)

    def describe(self) -> list[Metric]:
        """Nothing at registration: no run is read before somebody asks."""
        return []


def exposition(look: Callable[[], Iterable[RunView]]) -> bytes:
    """All metrics as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(look))
    return generate_latest(registry)


def _labels(run: RunView) -> list[str]:
    return [run.run_id[:_NAME_LENGTH], str(run.rank)]


def _state(runs: list[RunView]) -> Iterator[Metric]:
    info = InfoMetricFamily(f"{PREFIX}_run", "What is trained.", labels=["run", "rank"])
    status = GaugeMetricFamily(f"{PREFIX}_run_status", "1 for the status a run has.", labels=["run", "rank", "status"])
    updated = GaugeMetricFamily(
        f"{PREFIX}_last_record_timestamp_seconds", "When the newest record was written.", labels=["run", "rank"]
    )
    for run in runs:
        facts = {key: str(run.facts.get(key, ""))[:_NAME_LENGTH] for key in ("model", "precision", "placement_policy")}
        info.add_metric(_labels(run), {"name": run.name[:_NAME_LENGTH], **facts})
        for each in RunStatus:
            status.add_metric([*_labels(run), each.value], float(run.status is each))
        if run.updated is not None:
            updated.add_metric(_labels(run), run.updated)
    yield from (info, status, updated)


def _tiers(runs: list[RunView]) -> Iterator[Metric]:
    names = ("used", "peak", "capacity")
    texts = {"used": "Model data there now.", "peak": "The most model data so far.", "capacity": "What they may take."}
    families = {
        name: GaugeMetricFamily(f"{PREFIX}_tier_{name}_bytes", texts[name], labels=["run", "rank", "tier"])
        for name in names
    }
    at_risk = GaugeMetricFamily(
        f"{PREFIX}_oom_risk_ratio",
        "Share of what the process could have that it had at its peak; at 1 it is killed or an allocation fails.",
        labels=["run", "rank", "tier"],
    )
    homes = GaugeMetricFamily(f"{PREFIX}_chunk_homes", "Chunks whose home is there.", labels=["run", "rank", "tier"])
    for run in runs:
        risks = risk(run)
        for tier in TIERS:
            labels = [*_labels(run), tier]
            for name in names:
                value = run.peaks.get(tier) if name == "peak" else run.stats.get(f"{tier}/{name}_bytes")
                if value is not None:
                    families[name].add_metric(labels, value)
            if (share := risks[tier]) is not None:
                at_risk.add_metric(labels, share)
            if (count := run.stats.get(f"chunk/{tier}_count")) is not None:
                homes.add_metric(labels, count)
    yield from (*families.values(), at_risk, homes)


_GAUGES = (
    ("chunk/count", "chunks", "Chunks of the model."),
    ("chunk/resident_count", "chunk_copies", "Full copies on the device now."),
    ("non_model/peak_bytes", "non_model_peak_bytes", "The most activations and temporaries so far."),
    ("step/seconds", "last_step_seconds", "Duration of the last step."),
)
_COUNTERS = (
    ("step/count", "steps", "Optimizer steps."),
    ("step/skipped_count", "skipped_steps", "Steps skipped because a gradient overflowed."),
    ("move/fetch_count", "fetches", "Full copies that were made."),
    ("move/evict_count", "evictions", "Full copies that were dropped."),
    ("move/stall_seconds", "stall_seconds", "Time that units waited for their chunks."),
    ("move/disk_read_bytes", "disk_read_bytes", "Bytes read from the disk tier."),
    ("move/disk_write_bytes", "disk_written_bytes", "Bytes written to the disk tier."),
)


def _counters(runs: list[RunView]) -> Iterator[Metric]:
    for key, name, text in _GAUGES:
        yield _simple(GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["run", "rank"]), runs, key)
    for key, name, text in _COUNTERS:
        yield _simple(CounterMetricFamily(f"{PREFIX}_{name}", text, labels=["run", "rank"]), runs, key)
    needs = CounterMetricFamily(
        f"{PREFIX}_needs", "Times a unit needed a chunk, by whether it was there.", labels=["run", "rank", "outcome"]
    )
    waits = CounterMetricFamily(
        f"{PREFIX}_wait_seconds", "Time that units waited for chunks of a tier.", labels=["run", "rank", "tier"]
    )
    uploads = CounterMetricFamily(
        f"{PREFIX}_upload_bytes", "Bytes of full copies, by the tier they came from.", labels=["run", "rank", "tier"]
    )
    dropped = CounterMetricFamily(f"{PREFIX}_dropped_records", "Records that were lost.", labels=["run", "rank"])
    for run in runs:
        for outcome in ("resident", "hit", "late", "miss"):
            if (value := run.stats.get(f"need/{outcome}_count")) is not None:
                needs.add_metric([*_labels(run), outcome], value)
        for tier in TIERS:
            for family, key in ((waits, f"stall/{tier}_seconds"), (uploads, f"upload/{tier}_bytes")):
                if (value := run.stats.get(key)) is not None:
                    family.add_metric([*_labels(run), tier], value)
        dropped.add_metric(_labels(run), run.dropped_count)
    yield from (needs, waits, uploads, dropped)


def _process(runs: list[RunView]) -> Iterator[Metric]:
    for key, name, text in (
        ("rss_bytes", "process_resident_bytes", "RAM of the process."),
        ("free_bytes", "process_free_bytes", "RAM that the tightest limit leaves to the process."),
    ):
        family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["run", "rank"])
        for run in runs:
            if key in run.process:
                family.add_metric(_labels(run), run.process[key])
        yield family


def _simple(
    family: "GaugeMetricFamily | CounterMetricFamily", runs: list[RunView], key: str
) -> "GaugeMetricFamily | CounterMetricFamily":
    for run in runs:
        if key in run.stats:
            family.add_metric(_labels(run), run.stats[key])
    return family
