"""What to change, as arguments, and why. Pure: each rule looks at numbers and says at most one sentence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gemini.sizes import format_bytes
from gemini.stat.over_ranks import OverRanks, highest_risk
from gemini.stat.rates import RISK_HIGH, Rates, prediction
from gemini.telemetry.records import Description, Timeline
from gemini.telemetry.run_view import RunView

_STALLS_MATTER = 0.05
_WASTE_MATTERS = 0.05
_ERROR_MATTERS = 0.10
_WEAR_MATTERS = 1e12
"""Bytes written a day."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One thing worth doing, most urgent first."""

    is_urgent: bool
    text: str
    arguments: str | None
    """Of ``GeminiPlugin``, ready to paste; None where nothing there helps."""


def advise(run: RunView, found: Rates, chunks: Description | None, timeline: Timeline | None) -> list[Advice]:
    """What the numbers suggest; empty where all is well."""
    advices = [*_risks(run, found, timeline), *_surprises(run), *_stalls(run, found, chunks), *_rest(run, found)]
    return sorted(advices, key=lambda advice: not advice.is_urgent)


def advise_ranks(advices: Sequence[Advice], over: OverRanks) -> list[Advice]:
    """The same for several ranks: memory is short on one of them first, and the slowest one sets the pace.

    Parameters
    ----------
    advices
        For the rank that is shown in detail.
    """
    pairs = zip(over.ranks.views, over.rates, strict=True)
    run, found = max(pairs, key=lambda pair: (highest_risk(pair[1]) or 0.0, -pair[0].rank))
    urgent = [
        replace(advice, text=f"rank {run.rank}: {advice.text}")
        for advice in _risks(run, found, None)
        if advice.is_urgent
    ]
    return [*urgent, *_straggler(over), *(advice for advice in advices if not advice.is_urgent)]


def _straggler(over: OverRanks) -> Iterator[Advice]:
    found, own = over.ranks.straggler, over.spreads.get("own_seconds")
    if found is None or own is None or not over.straggler_text:
        return
    stalls, stall = over.spreads.get("stall_seconds"), over.values(lambda _, rates: rates.stall_seconds)[found.rank]
    longer = (stall or 0.0) - (stalls.median if stalls is not None else 0.0)
    if longer > (found.own_seconds - own.median) / 2:
        why = "waits longer for its chunks: its host or disk is slower, or holds more"
    else:
        why = "computes longer: its device is slower, or its batches are larger"
    yield Advice(is_urgent=False, text=f"the others wait for rank {found.rank}, which {why}", arguments=None)


def _risks(run: RunView, found: Rates, timeline: Timeline | None) -> Iterator[Advice]:
    host = found.risk.get("host")
    if host is not None and host >= RISK_HIGH:
        resident, free = (run.process.get(key, 0.0) for key in ("rss_peak_bytes", "free_bytes"))
        used = run.stats.get("host/used_bytes", 0.0)
        give_back = resident - 0.8 * (resident + free)
        wanted = int(used - give_back)
        text = f"RAM: {host:.0%} of what this process may have; the system kills it at 100%"
        if wanted > used / 2:
            where = "" if run.stats.get("disk/capacity_bytes") else ", offload_dir=..."
            yield Advice(is_urgent=True, text=text, arguments=f'host_memory="{wanted >> 20}MiB"{where}')
        else:
            yield Advice(is_urgent=True, text=f"{text}; smaller batches or activation checkpointing", arguments=None)
    device = found.risk.get("device")
    if device is not None and device >= RISK_HIGH and not run.stats.get("memory/unified"):
        used = int(run.stats.get("device/capacity_bytes", 0.0) * 0.85)
        yield Advice(
            is_urgent=True,
            text=f"device: {device:.0%} of its memory is taken",
            arguments=f'device_memory="{used >> 20}MiB"',
        )
    if timeline is not None and timeline.non_model_bytes:
        model, other = timeline.model_bytes[timeline.peak], timeline.non_model_bytes[timeline.peak]
        capacity = run.stats.get("device/capacity_bytes", 0.0)
        if other > max(model, 0.3 * capacity) and not run.stats.get("memory/unified"):
            text = f"activations take {format_bytes(other)} at the peak, more than model data: checkpoint them"
            yield Advice(is_urgent=False, text=text, arguments=None)


def _surprises(run: RunView) -> Iterator[Advice]:
    """Where steps take another amount of memory than the warm-up made one expect."""
    seen = prediction(run.stats)
    if seen is None or abs(seen.ratio - 1) <= _ERROR_MATTERS:
        return
    text = (
        f"{seen.tier}: a step takes {format_bytes(seen.measured)}, {format_bytes(seen.predicted)} were predicted after "
        f"the warm-up ({seen.ratio - 1:+.0%})"
    )
    capacity = run.stats.get(f"{seen.tier}/capacity_bytes", 0.0)
    more = seen.measured - seen.predicted
    if more < 0:
        text += ": the warm-up's batch was heavier than those that follow, larger ones have room"
        yield Advice(is_urgent=False, text=text, arguments=None)
    elif seen.non_model_growth < more / 2:
        yield Advice(is_urgent=False, text=f"{text}: full copies stay that the plan lets go", arguments=None)
    else:
        text += ": batches are heavier than the first one, or the training keeps tensors from step to step"
        less = int(capacity - more)
        arguments = f'{seen.tier}_memory="{less >> 20}MiB"' if less > capacity / 2 else None
        yield Advice(is_urgent=False, text=text, arguments=arguments)


def _stalls(run: RunView, found: Rates, chunks: Description | None) -> Iterator[Advice]:
    if found.stall_ratio is None or found.stall_ratio < _STALLS_MATTER or not found.stall_by_tier:
        return
    tier, seconds = max(found.stall_by_tier.items(), key=lambda item: item[1])
    total = found.stall_seconds or 0.0
    waiting = f"{found.stall_ratio:.0%} of a step is waiting"
    if seconds < total / 2:  # the rest of the waiting is for updates of the optimizer
        yield Advice(is_urgent=False, text=f"{waiting}, mostly for the optimizer's updates", arguments=None)
        return
    depth = chunks.config.get("max_prefetch") if chunks is not None else None
    late, missed = found.needs.get("late", 0.0), found.needs.get("miss", 0.0)
    text = f"{waiting}, {seconds / total:.0%} of it for {tier}"
    if tier == "disk" and (on_disk := run.stats.get("disk/used_bytes")):
        capacity = int(run.stats.get("host/capacity_bytes", 0.0) + on_disk)
        yield Advice(
            is_urgent=False,
            text=f"{text}: {format_bytes(on_disk)} of homes are there",
            arguments=f'host_memory="{-(-capacity >> 20)}MiB"',
        )
    elif tier == "host" and chunks is not None and _could_split(chunks):
        text += ": masters there could have their full copies in them, unless parameters are changed in place"
        yield Advice(is_urgent=False, text=text, arguments="split_master=True")
    elif late > missed and isinstance(depth, int) and depth < 8:
        yield Advice(is_urgent=False, text=f"{text}: prefetches come late", arguments=f"max_prefetch={depth + 2}")
    elif missed:
        capacity = int(1.5 * run.stats.get("device/capacity_bytes", 0.0))
        yield Advice(
            is_urgent=False,
            text=f"{text}: {missed:.0f} fetches a step on demand, full copies have too little room",
            arguments=f'device_memory="{capacity >> 20}MiB"' if not run.stats.get("memory/unified") else None,
        )


def _could_split(chunks: Description) -> bool:
    """Whether masters in two halves would have full copies where now they are filled from masters in the same RAM."""
    if not chunks.unified or chunks.config.get("precision") != "bf16" or chunks.config.get("split_master") is not False:
        return False
    moments = {"exp_avg", "exp_avg_sq"}
    return any(
        set(chunk.states) == moments and all(chunk.home_bytes.get(name) == 4 * chunk.numel for name in moments)
        for chunk in chunks.chunks
        if chunk.homes.get("master") == "host"
    )


def _rest(run: RunView, found: Rates) -> Iterator[Advice]:
    if found.disk_written_per_day is not None and found.disk_written_per_day > _WEAR_MATTERS:
        tera = found.disk_written_per_day / 1e12
        yield Advice(
            is_urgent=False,
            text=f"{tera:.1f} TB a day are written to disk: a drive rated for 1,200 TB lasts {1200 / tera:,.0f} days",
            arguments=None,
        )
    waste = run.stats.get("chunk/waste_ratio", 0.0)
    if waste > _WASTE_MATTERS:
        yield Advice(
            is_urgent=False,
            text=f"{waste:.0%} of the chunks is padding: leave the chunk size to the search",
            arguments="chunk_config_dict=None",
        )
    if run.dropped_count:
        text = f"{run.dropped_count} records were dropped: the disk of the run folder could not keep up"
        yield Advice(is_urgent=False, text=text, arguments=None)
