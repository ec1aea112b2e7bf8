"""A run's numbers as Prometheus metrics: a custom collector that reads the newest records at each scrape.

Never prometheus_client's multiprocess mode, which leaves files behind for every process that dies. No chunk, unit or
parameter is a label: a label's values must stay few.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from gemini.stat.rates import risk
from gemini.stat.text import printable
from gemini.telemetry.records import Process
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.run_view import RunView
from gemini.telemetry.statistics import Family, lines_of, table

PREFIX = "gemini_memory"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_NAME_LENGTH = 120


class RunCollector:
    """Collector that prometheus_client asks at each scrape.

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
        yield from _risks(runs)
        yield from _statistics(runs)
        yield from _dropped(runs)

    def describe(self) -> list[Metric]:
        """Return nothing at registration, so that no run is read before a scrape."""
        return []


def exposition(look: Callable[[], Iterable[RunView]]) -> bytes:
    """All metrics as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(look))
    return generate_latest(registry)


def _labels(run: RunView) -> list[str]:
    return [printable(run.identity.run_id, _NAME_LENGTH), str(run.rank)]


def _state(runs: list[RunView]) -> Iterator[Metric]:
    info = InfoMetricFamily(f"{PREFIX}_run", "What is trained.", labels=["run", "rank"])
    status = GaugeMetricFamily(f"{PREFIX}_run_status", "1 for the status a run has.", labels=["run", "rank", "status"])
    updated = GaugeMetricFamily(
        f"{PREFIX}_last_record_timestamp_seconds", "When the newest record was written.", labels=["run", "rank"]
    )
    for run in runs:
        name, known = printable(run.identity.name, _NAME_LENGTH), run.identity.facts
        keys = ("model", "precision", "placement_policy")
        facts = {key: printable(str(known.get(key, "")), _NAME_LENGTH) for key in keys}
        info.add_metric(_labels(run), {"name": name, **facts})
        for each in RunStatus:
            status.add_metric([*_labels(run), each.value], float(run.status is each))
        if run.updated is not None:
            updated.add_metric(_labels(run), run.updated)
    yield from (info, status, updated)


def _risks(runs: list[RunView]) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        f"{PREFIX}_oom_risk_ratio",
        "Share of what the process could have that it had at its peak; at 1 it is killed or an allocation fails.",
        labels=["run", "rank", "tier"],
    )
    for run in runs:
        for tier, share in risk(run).items():
            if share is not None:
                family.add_metric([*_labels(run), tier], share)
    yield family


def _statistics(runs: list[RunView]) -> Iterator[Metric]:
    """The metrics of the table of statistics."""
    families: dict[Family, GaugeMetricFamily | CounterMetricFamily] = {}
    of_runs = [(_labels(run), _numbers(run)) for run in runs]
    for line in (*table(), *lines_of("process", Process)):
        if line.sample is None:
            continue
        known, value = line.sample
        if known not in families:
            kind = CounterMetricFamily if known.kind == "counter" else GaugeMetricFamily
            labels = ["run", "rank"] if known.label is None else ["run", "rank", known.label]
            families[known] = kind(f"{PREFIX}_{known.name}", known.help, labels=labels)
        for labels, numbers in of_runs:
            if line.key in numbers:
                families[known].add_metric(labels if known.label is None else [*labels, value], numbers[line.key])
    yield from families.values()


def _numbers(run: RunView) -> dict[str, float]:
    """By key; of peaks the highest in the records that were read."""
    peaks = {f"{tier}/peak_bytes": peak for tier, peak in run.peaks.items()}
    return {**run.stats, **peaks, **{f"process/{name}": value for name, value in run.process.items()}}


def _dropped(runs: list[RunView]) -> Iterator[Metric]:
    family = CounterMetricFamily(f"{PREFIX}_dropped_records", "Records that were lost.", labels=["run", "rank"])
    for run in runs:
        family.add_metric(_labels(run), run.dropped_count)
    yield family
