"""The live screen: which parts, in which order, and how they share the lines there are."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.text import Text

from gemini.lease.machine import Machine
from gemini.stat import machine_panel, panels, rank_panels
from gemini.stat.advice import Advice, advise, advise_ranks
from gemini.stat.over_ranks import OverRanks
from gemini.stat.rates import Rates, rates
from gemini.stat.sight import Sight
from gemini.stat.snapshot import STATUS_STYLES
from gemini.stat.text import duration, printable, seconds
from gemini.telemetry.records import Description, Timeline
from gemini.telemetry.run_status import RunStatus
from gemini.telemetry.run_view import RunView

PARTS = ("tiers", "ranks", "machine", "timeline", "chunks", "moves", "advice")
KEYS = "q quit  r rank  t timeline  c chunks  m moves  a advice  p pause  s save  ? help"
_DETAILS = {"moves": 4, "chunks": 3, "timeline": 6}
"""Parts that are about one rank, the most telling first, and the lines that each takes at least."""
_ROOM_FOR_DETAILS = 30
"""With fewer lines the list of ranks takes all there are; the parts about one rank come when that is shown."""
_MEMORIES = 3
"""Of the machine, lines at most."""
_TOGGLES = {"t": "timeline", "c": "chunks", "m": "moves", "a": "advice"}
HELP = (
    "q     leave; the run goes on",
    "r     one rank after the other, when there are several, then all of them",
    "t c m a   show or hide the timeline, the chunk map, moves, advice",
    "p     freeze what is shown; once more: go on",
    "s     write what is shown to gemini-stat.txt in the present folder",
    "?     this help; any key leaves it",
    "",
    "tiers   used and peak are model data as counted; capacity is what they may",
    "        take. risk is of the process: at 100% it is killed, or an",
    "        allocation fails. Full homes are no risk, a full RAM is.",
    "moves   per step, of the last ten seconds; speed while moving",
)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """All that is known about a run at one moment: one rank in detail, all of them where they are compared."""

    sight: Sight
    rates: Rates
    over_ranks: OverRanks | None
    """All ranks, where several are compared."""
    advices: Sequence[Advice]
    chunks: Description | None
    timeline: Timeline | None
    machine: Machine | None = None
    """What runs on this machine share, while this one is among them."""

    @property
    def run(self) -> RunView:
        return self.sight.run


@dataclass(kw_only=True)
class View:
    """What the person at the keys has chosen."""

    hidden: set[str] = field(default_factory=set)
    is_paused: bool = False
    is_help: bool = False
    message: str = ""

    def press(self, key: str) -> bool:
        """Take a key that changes what is shown; False if it is another key."""
        self.message = ""
        if self.is_help:
            self.is_help = False
        elif key in _TOGGLES:
            self.hidden ^= {_TOGGLES[key]}
        elif key == "?":
            self.is_help = True
        elif key == "p":
            self.is_paused = not self.is_paused
        else:
            return False
        return True

    def say(self, message: str) -> None:
        """Show a message in place of the keys, until the next key."""
        self.message = message


def gather(
    sight: Sight,
    chunks: Description | None,
    timeline: Timeline | None,
    hardware: dict[str, float],
    machine: Machine | None = None,
) -> Shown:
    """What is known about a run, with what follows from it."""
    run = sight.run
    found = rates(run, hardware)
    over = None if sight.ranks is None else OverRanks.of(sight.ranks)
    advices = advise(run, found, chunks, timeline)
    return Shown(
        sight=sight,
        rates=found,
        over_ranks=over,
        advices=advices if over is None else advise_ranks(advices, over),
        chunks=chunks,
        timeline=timeline,
        machine=machine if machine is not None and machine.leases else None,
    )


def screen(shown: Shown, view: View, width: int, height: int, plain: bool, keys: bool = True) -> Group:
    """Everything on ``height`` lines of ``width`` columns."""
    lines = [_header(shown.sight, width, view, plain)]
    if view.is_help:
        lines += [Text(f" {line}") for line in HELP]
    elif not shown.run.stats:
        lines += ["", *_empty(shown.run)]  # type: ignore[list-item]
    else:
        lines += _parts(shown, view, width, height - len(lines) - int(keys) - bool(shown.sight.reason), plain)
    if shown.sight.reason:
        bad = shown.sight.status in (RunStatus.CRASHED, RunStatus.STALLED)
        lines.insert(1, Text(f" {printable(shown.sight.reason, width - 2)}", style="red" if bad else "dim"))
    lines = lines[: height - int(keys)]
    if keys:
        lines += [Text("")] * (height - 1 - len(lines))
        lines.append(Text(f" {view.message or KEYS}"[:width], style="reverse" if view.message else "dim"))
    return Group(*lines)


def _header(sight: Sight, width: int, view: View, plain: bool) -> Text:
    run, identity = sight.run, sight.run.identity
    line = Text(" ", no_wrap=True, overflow="crop" if plain else "ellipsis")
    line.append(f" {sight.status.name} ", style=STATUS_STYLES[sight.status])
    line.append(f" {printable(identity.name, 24) or 'run'}", style="bold")
    if width >= 100:
        line.append(f"  {printable(identity.run_id, 30)}", style="cyan")
    if sight.step is not None:
        line.append(f"  step {sight.step:,}  {seconds(run.stats.get('step/seconds'))}/step")
    for extra in (sight.rank_text, panels.eta(run)):
        line.append(f"  {extra}" if extra else "")
    if identity.started is not None:
        until = time.time() if sight.is_live else run.updated
        line.append(f"  up {duration((until or identity.started) - identity.started)}")
    if view.is_paused:
        line.append("  PAUSED", style="bold yellow")
    clock = time.strftime(" %H:%M:%S")
    line.truncate(max(0, width - len(clock)))
    line.append(" " * (width - len(clock) - line.cell_len) + clock, style="dim")
    return line


def _empty(run: RunView) -> list[Text]:
    if run.is_live:
        return [Text(" warm-up: the first step records the timeline; nothing to show before it ends")]
    return [Text(" this run ended before its first step")]


def _parts(shown: Shown, view: View, width: int, height: int, plain: bool) -> list[Text]:
    """Fixed parts first; the timeline and the chunk map get what is left, or go where all ranks leave none."""
    wide = width >= 100
    run, wanted = shown.run, [part for part in PARTS if part not in view.hidden]
    blocks: dict[str, list[Text]] = {"ranks": []}
    if shown.over_ranks is None:
        title = panels.heading("memory by tier", width, plain, panels.foreseen(run))
        blocks["tiers"] = [title, *panels.tiers(run, shown.rates, width, plain)]
    else:
        title = panels.heading("memory by tier, over ranks", width, plain)
        blocks["tiers"] = [title, *rank_panels.tiers(shown.over_ranks, width, plain)]
        few = height < _ROOM_FOR_DETAILS
        blocks["ranks"] = _ranks(shown.over_ranks, width, max(2, height - (14 if few else 30)), plain)
    blocks["machine"] = [] if shown.machine is None else _machine(shown.machine, width, plain)
    moving = [*panels.moves(shown.rates, width), *panels.activations(run.stats, width)]
    blocks["moves"] = [panels.heading(_moves_title(shown), width, plain), *moving]
    limit = 4 if height >= 34 else 1
    blocks["advice"] = [
        panels.heading("advice", width, plain, "arguments of GeminiPlugin"),
        *panels.advices(shown.advices, width, limit),
    ]
    if shown.over_ranks is not None:
        wanted = _that_fit(wanted, blocks, height)
    left = height - sum(len(blocks[part]) for part in wanted if part in blocks)
    if "chunks" in wanted:
        rows = max(1, min(6, left - 9 if "timeline" in wanted else left - 2))
        note = panels.map_note(run, wide)
        count = f"chunks {len(shown.chunks.chunks)}" if shown.chunks is not None else "chunks"
        block = [
            panels.heading(count + _of_rank(shown), width, plain, note),
            *panels.chunk_map(run, shown.chunks, width, rows),
        ]
        if wide and shown.chunks is not None:
            block.append(panels.homes(shown.chunks.chunks, width))
        blocks["chunks"] = block
        left -= len(block)
    if "timeline" in wanted:
        blocks["timeline"] = _timeline(shown, width, max(2, min(14, left - 2)), plain)
    return [line for part in wanted for line in blocks[part]]


def _that_fit(wanted: Sequence[str], blocks: Mapping[str, Sequence[Text]], height: int) -> list[str]:
    """The parts about all ranks, and those about one for which they leave room."""
    kept = [part for part in wanted if part not in _DETAILS]
    left = height - sum(len(blocks[part]) for part in kept)
    for part, least in _DETAILS.items():
        lines = len(blocks.get(part, ())) or least
        if part in wanted and lines <= left:
            kept.append(part)
            left -= lines
    return [part for part in wanted if part in kept]


def _machine(machine: Machine, width: int, plain: bool) -> list[Text]:
    title = panels.heading("memory of the machine", width, plain, "gemini-stat lease")
    return [title, *machine_panel.memories(machine, width)[:_MEMORIES]]


def _ranks(over: OverRanks, width: int, most: int, plain: bool) -> list[Text]:
    note = "* straggler   of a step: own part, and waiting for ranks" if width >= 100 else "* straggler"
    title = panels.heading(f"ranks {len(over.ranks.views)}", width, plain, note)
    return [title, *rank_panels.notes(over, width), *rank_panels.ranks(over, width, most)]


def _timeline(shown: Shown, width: int, height: int, plain: bool) -> list[Text]:
    if shown.timeline is None:
        return [panels.heading("one step by moment", width, plain), Text(" not recorded yet", style="dim")]
    units = shown.chunks.units if shown.chunks is not None else ()
    where = panels.describe_peak(shown.timeline, units)
    legend = "# model + non-model" if plain else "█ model ▒ non-model"
    step = f"step {shown.timeline.step:,}{_of_rank(shown)}"
    title = f"{step} by moment   {legend}" if width >= 100 else step
    capacity = shown.run.stats.get("device/capacity_bytes")
    chart = panels.timeline(shown.timeline, units, capacity, width, height, plain)
    return [panels.heading(title, width, plain, where), *chart]


def _moves_title(shown: Shown) -> str:
    title = f"moves and waits{_of_rank(shown)}"
    return f"{title}, in {shown.rates.steps} steps" if shown.rates.steps else title


def _of_rank(shown: Shown) -> str:
    """Which rank a part is about, where others are about all."""
    return "" if shown.over_ranks is None else f" of rank {shown.run.rank}"
