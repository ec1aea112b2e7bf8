"""``gemini-stat explain-oom``: what there was when memory ran out, and the changes with which there would be enough."""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from gemini.chunk import Tier
from gemini.sizes import format_bytes, parse_bytes
from gemini.stat import estimate_outputs
from gemini.stat.console import Exit, find, print_json
from gemini.stat.sight import Sight, read
from gemini.stat.text import printable, size
from gemini.telemetry.discovery import NoRun
from gemini.telemetry.documents import read_chunks, read_oom, read_timeline
from gemini.telemetry.layout import TIERS, oom_file
from gemini.telemetry.records import Description, OutOfMemoryDocument, TierUse, Timeline
from gemini.telemetry.run_view import RunView

from .changes import Case, Change, Check, estimated
from .command import assignment
from .demand import GUARD, Machine, as_argument
from .recorded import config_of, limits_of, owners_of, packs, state_slots
from .subject import NotFound, Subject, find_subject, recorded_subject

HELP = "What there was when memory ran out (or, of a run that goes on, at its peak), and what would have helped."
CHANGES = 3
_MIB = 1 << 20
_CHECKED = {
    Check.ESTIMATE: "verified: the estimate says that a whole step fits",
    Check.PACKING: "verified for model data by the trainer's packing; what activations take then is not known",
    Check.NOTHING: "not verified",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", help="what was trained, as for estimate (models of transformers are recorded)"
    )
    parser.add_argument(
        "--set", type=assignment, action="append", default=[], metavar="NAME=VALUE", help="a field of its configuration"
    )
    parser.add_argument("--checkpointing", action="store_true", help="it did recompute activations")


def run(options: argparse.Namespace) -> Exit:
    path = find(options)
    found = _rank(path, read(path, options))
    oom, chunks = read_oom(path, found.rank), read_chunks(path, found.rank)
    timeline = _timeline(oom, path, found.rank)
    if oom is None and timeline is None:
        raise NoRun(f"{path} has recorded neither an out-of-memory error nor a timeline")
    case, unknown = _case(options, oom, chunks)
    changes: list[Change] = []
    if case is not None:
        try:
            changes = list(islice(estimated(case), CHANGES))
        except Exception as error:  # a model that cannot be run on fake tensors, or a record that is not what it seems
            unknown = f"the estimate failed: {type(error).__name__}: {error}"
    if case is None or unknown is not None:
        changes = list(islice(_recorded(found, oom, chunks, timeline), CHANGES))
    holders = _holders(found, oom, chunks, timeline)
    if options.json:
        print_json(
            estimate_outputs.Explanation(
                run_id=found.identity.run_id,
                rank=found.rank,
                error=None if oom is None else oom.error,
                phase=None if oom is None else oom.phase,
                unit=None if oom is None else oom.unit,
                tiers=_tiers(found, oom),
                holders=[estimate_outputs.Holder(what, nbytes) for what, nbytes in holders],
                changes=[_as_json(change) for change in changes],
                not_estimated=unknown,
            )
        )
    else:
        _show(found, oom, chunks, timeline, holders)
        _show_changes(changes, unknown)
    return Exit.OK


def _rank(path: Path, sight: Sight) -> RunView:
    """Of several ranks the one whose memory ran out; the first, if that of several did."""
    views = [sight.run] if sight.ranks is None else sight.ranks.views
    ran_out = [view for view in views if read_oom(path, view.rank) is not None]
    return min(ran_out, key=lambda view: oom_file(path, view.rank).stat().st_mtime, default=sight.run)


def _as_json(change: Change) -> estimate_outputs.Change:
    return estimate_outputs.Change(
        text=change.text,
        arguments=change.arguments,
        verified=change.check is not Check.NOTHING,
        verified_by=change.check.value,
        batch_size=change.batch_size,
        seq_len=change.seq_len,
        checkpointing=change.checkpointing,
        ram_bytes=change.ram_bytes,
    )


def _case(
    options: argparse.Namespace, oom: OutOfMemoryDocument | None, chunks: Description | None
) -> tuple[Case | None, str | None]:
    """What the estimate can be asked about, or why it cannot."""
    if oom is None or chunks is None:
        return None, "no out-of-memory error and its batch are recorded"
    shape = oom.batch_shapes[0] if oom.batch_shapes else []
    if not shape:
        return None, "the shape of the batch is not recorded"
    machine = _machine(chunks)
    if machine is None:
        return None, "how much memory there was is not recorded"
    try:
        subject, recomputes = _subject(options, chunks)
    except NotFound as error:
        if options.model is not None:
            raise NoRun(str(error)) from error
        return None, str(error)
    slots = state_slots(chunks.chunks)
    folder = chunks.config.get("offload_dir")
    case = Case(
        subject=subject,
        config=config_of(chunks),
        slots=tuple(slots),
        numel=sum(math.prod(item.shape) for item in chunks.parameters),
        machine=machine,
        batch_size=shape[0],
        seq_len=shape[1] if len(shape) == 2 else 1,
        is_text=len(shape) == 2,
        checkpointing=recomputes,
        offload_dir=str(folder) if folder else None,
    )
    return case, None


def _subject(options: argparse.Namespace, chunks: Description) -> tuple[Subject, bool]:
    if options.model is not None:
        return find_subject(options.model, dict(options.set)), options.checkpointing
    if chunks.model is None or not isinstance(chunks.model.get("config"), dict):
        raise NotFound("the model is not known: --model MODEL has the estimate verify changes")
    return recorded_subject(chunks.model, len(chunks.parameters)), bool(chunks.model.get("checkpointing"))


def _machine(chunks: Description) -> Machine | None:
    if not chunks.ram_bytes or not (chunks.unified or chunks.device_limit_bytes):
        return None
    return Machine(
        device_bytes=None if chunks.unified else chunks.device_limit_bytes,
        ram_bytes=chunks.ram_bytes,
        disk_bytes=limits_of(chunks)[Tier.DISK],
        ranks=owners_of(chunks),
    )


def _timeline(oom: OutOfMemoryDocument | None, path: Path, rank: int) -> Timeline | None:
    """The last whole step, or what there was of the first one."""
    whole = (oom.last_timeline if oom is not None else None) or read_timeline(path, rank)
    return whole or (oom.moments_before if oom is not None else None)


def _tiers(run_: RunView, oom: OutOfMemoryDocument | None) -> dict[str, TierUse]:
    """Used and capacity when it happened, or now."""
    if oom is not None:
        return oom.tiers
    names = TierUse.__struct_fields__
    return {tier: TierUse(*(int(run_.stats.get(f"{tier}/{name}", 0.0)) for name in names)) for tier in TIERS}


def _holders(
    run_: RunView, oom: OutOfMemoryDocument | None, chunks: Description | None, timeline: Timeline | None
) -> list[tuple[str, int]]:
    """Who has the memory, most first."""
    homes = Counter[str]()
    for chunk in chunks.chunks if chunks is not None else ():
        for role, nbytes in chunk.home_bytes.items():
            homes["states" if role in chunk.states else role] += nbytes
    used = _tiers(run_, oom)["device"].used_bytes
    non_model = 0 if oom is None else oom.non_model_peak_bytes
    if timeline is not None:
        non_model = max(non_model, timeline.non_model_bytes[timeline.peak])
    found = [
        ("optimizer states", homes["states"]),
        ("masters and frozen parameters", homes["master"] + homes["master_low"] + homes["absmax"]),
        ("gradients", homes["gradient"]),
        ("bf16 shadows of masters", homes["shadow"]),
        ("activations and temporaries at the peak", non_model),
        ("full copies" + (" (in RAM)" if _is_unified(run_, chunks) else ""), used),
    ]
    return sorted((item for item in found if item[1] > 0), key=lambda item: -item[1])


def _is_unified(run_: RunView, chunks: Description | None) -> bool:
    return chunks.unified if chunks is not None else bool(run_.stats.get("memory/unified"))


def _recorded(
    run_: RunView, oom: OutOfMemoryDocument | None, chunks: Description | None, timeline: Timeline | None
) -> Iterator[Change]:
    """What records alone say."""
    tiers = _tiers(run_, oom)
    where = "host" if _is_unified(run_, chunks) or _tier_of(oom) == "host" else "device"
    non_model = max(timeline.non_model_bytes, default=0) if timeline is not None else 0
    missing = _missing(oom) or _MIB
    if chunks is not None:
        yield from _smaller_budget(chunks, tiers, where, missing)
        yield from _more_room(chunks, tiers, where, missing, "" if oom is None else oom.error)
    if non_model:
        ratio = max(0.0, 1 - (missing * (1 + GUARD)) / non_model)
        if ratio > 0:
            text = (
                f"batches of {ratio:.0%} of the size: activations took {format_bytes(non_model)} "
                f"and {format_bytes(missing)} were missing"
            )
            yield Change(text=text)
    yield Change(text="recompute activations in backward (model.gradient_checkpointing_enable())")


def _smaller_budget(chunks: Description, tiers: Mapping[str, TierUse], where: str, missing: int) -> Iterator[Change]:
    """Less model data where memory ran out, and the rest one tier down."""
    limits = limits_of(chunks)
    capacity = limits[Tier(where)]
    smaller = min(tiers[where].used_bytes, capacity) - round(missing * (1 + GUARD))
    moved = capacity - smaller
    name = f"{where}_memory"
    if smaller > 0 and packs(chunks, {**limits, Tier(where): smaller}):
        yield Change(
            text=f"{format_bytes(missing)} less of model data on {where}; the rest has room elsewhere",
            arguments=f"{name}={as_argument(smaller)}",
            check=Check.PACKING,
        )
        return
    disk = limits[Tier.DISK] + 2 * moved
    if smaller > 0 and packs(chunks, {**limits, Tier(where): smaller, Tier.DISK: disk}):
        yield Change(
            text=f"{format_bytes(missing)} less of model data on {where}, {format_bytes(disk)} of disk for the rest",
            arguments=f'{name}={as_argument(smaller)}, offload_dir=..., disk_memory="{-(-disk // _MIB)}MiB"',
            check=Check.PACKING,
        )


def _more_room(
    chunks: Description, tiers: Mapping[str, TierUse], where: str, missing: int, error: str
) -> Iterator[Change]:
    """What our own errors say outright, or the memory that was missing."""
    named = re.search(r"set (device|host|disk)_memory to (\d+) bytes(?! or less)", error)
    if named is None and re.search(r"\b(device|host|disk) tier out of memory(?!\. The model's own)", error) is None:
        # The memory for model data was not too small: with more of it there would be even less for the rest.
        yield Change(text=f"{format_bytes(missing)} more of {where} memory at least, if there is so much")
        return
    tier, nbytes = (named[1], int(named[2])) if named else (where, tiers[where].capacity_bytes + missing)
    limits = {**limits_of(chunks), Tier(tier): nbytes}
    yield Change(
        text=f"{format_bytes(nbytes)} for model data on {tier}, if there is so much",
        arguments=f'{tier}_memory="{-(-nbytes // _MIB)}MiB"',
        check=Check.PACKING if packs(chunks, limits) else Check.NOTHING,
    )


def _tier_of(oom: OutOfMemoryDocument | None) -> str:
    text = "" if oom is None else oom.error
    named = re.search(r"\b(device|host|disk) tier out of memory", text)
    if named:
        return named[1]
    return "device" if "CUDA" in text else "host"


def _missing(oom: OutOfMemoryDocument | None) -> int:
    """Bytes that could not be had, as far as the error says so."""
    text = "" if oom is None else oom.error
    for pattern in (r"needs ([\d.]+ [KMGT]?i?B)\b", r"[Tt]ried to allocate ([\d.]+ (?:[KMGT]i)?B)\b"):
        if match := re.search(pattern, text):
            return parse_bytes(match[1])
    match = re.search(r"tried to allocate (\d+) bytes", text)
    return 0 if match is None else int(match[1])


def _show(
    run_: RunView,
    oom: OutOfMemoryDocument | None,
    chunks: Description | None,
    timeline: Timeline | None,
    holders: list[tuple[str, int]],
) -> None:
    if oom is not None:
        print(f"{printable(oom.error, 600)}")
        print(f"in {oom.phase} of {printable(oom.unit or 'no unit', 120)}")
    else:
        print("no out-of-memory error was recorded; this is the present peak")
    print(f"\n{'':<8}{'used':>12}{'capacity':>12}")
    for tier, at in _tiers(run_, oom).items():
        if at.capacity_bytes:
            print(f"{tier:<8}{size(at.used_bytes):>12}{size(at.capacity_bytes):>12}")
    if timeline is not None:
        from gemini.stat.panels import describe_peak

        print(f"\nstep {timeline.step}: {describe_peak(timeline, chunks.units if chunks is not None else ())}")
    print("\nwho has it")
    for what, nbytes in holders:
        print(f"{size(nbytes):>12}  {what}")


def _show_changes(changes: list[Change], unknown: str | None) -> None:
    print("\nwhat would have helped" if changes else "\nno change was found with which it fits")
    for index, change in enumerate(changes, 1):
        print(f" {index}. {change.text}")
        if change.arguments:
            print(f"    {change.arguments if '(' in change.arguments else f'GeminiPlugin({change.arguments})'}")
        print(f"    {_CHECKED[change.check]}")
    if unknown is not None:
        print(f"\nactivations were not estimated: {unknown}")
