"""The parts of the live screen, each as lines of a given width. No part knows of the others."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.text import Text

from gemini.stat.advice import Advice
from gemini.stat.rates import RISK_HIGH, Rates, prediction
from gemini.stat.text import count, duration, percent, printable, seconds, size
from gemini.telemetry.documents import states_of
from gemini.telemetry.layout import DIVIDED, TIERS
from gemini.telemetry.records import DescribedChunk, Description, Timeline
from gemini.telemetry.run_view import RunView

LETTERS = {"d": "blue", "h": "green", "k": "yellow", "D": "bold blue", "H": "bold green", "K": "bold yellow"}
MOVING, IN_USE = "bold magenta", "bold black on white"


def heading(title: str, width: int, plain: bool, note: str = "") -> Text:
    """A line with a title on the left and a remark on the right."""
    line = "-" if plain else "─"
    title, note = f"{line}{line} {title} ", f" {note} {line}{line}" if note else ""
    fill = max(0, width - len(title) - len(note))
    return Text.assemble((title, "bold"), (line * fill + note, "dim"), no_wrap=True)


def tiers(run: RunView, found: Rates, width: int, plain: bool) -> list[Text]:
    """A line a tier: bar, used, capacity, peak, risk, kinds of data."""
    wide = width >= 100
    bar_width = max(8, min(50, width - (78 if wide else 54)))
    head = f" {'':<7}{'':<{bar_width}}{'used':>11}{'capacity':>11}{'peak':>11}{'risk':>8}"
    lines = [Text(head, style="dim")]
    for tier in TIERS:
        used, capacity = run.stats.get(f"{tier}/used_bytes"), run.stats.get(f"{tier}/capacity_bytes")
        peak, risk = run.peaks.get(tier), found.risk.get(tier)
        if not used and not capacity:
            lines.append(Text(f" {tier:<7}not used", style="dim"))
            continue
        line = Text(f" {tier:<7}", style="bold")
        line.append_text(bar(used, peak, capacity, bar_width, plain))
        line.append(f"{size(used):>11}{size(capacity):>11}{size(peak):>11}", style="default")
        mark = "!" if risk is not None and risk >= RISK_HIGH else " "
        line.append(f"{percent(risk, 0):>7}{mark}", style="bold red" if mark == "!" else "default")
        if wide:
            line.append(_kinds(run, tier), style="dim")
        lines.append(line)
    return lines


def foreseen(run: RunView) -> str:
    """The predicted and the measured peak of a step; empty before both are known."""
    found = prediction(run.stats)
    if found is None:
        return ""
    return f"{found.tier}: predicted {size(found.predicted)}, measured {size(found.measured)} ({found.ratio - 1:+.0%})"


def _kinds(run: RunView, tier: str) -> str:
    where = "host" if run.stats.get("memory/unified") else "device"
    if tier == where:
        return f"  non-model {size(run.stats.get('non_model/peak_bytes'))}"
    if tier == "device" and run.stats.get("memory/unified"):
        return "  the same RAM as host"
    resident = run.process.get("rss_bytes")
    return f"  process {size(resident)}" if tier == "host" and resident else ""


def bar(used: float | None, peak: float | None, capacity: float | None, width: int, plain: bool) -> Text:
    """Used, then how far the peak went beyond it, then what was never used."""
    full, beyond, rest = "#+." if plain else "█▒░"

    def cells(value: float | None) -> int:
        if not value or not capacity or value < 0:
            return 0
        return min(width, max(1, round(value / capacity * width)))  # a little is not nothing

    first = cells(used)
    second = max(0, cells(peak) - first)
    shown = Text()
    shown.append(full * first, style="green")
    shown.append(beyond * second, style="yellow")
    shown.append(rest * (width - first - second), style="dim")
    return shown


def timeline(
    found: Timeline, units: Sequence[str], capacity: float | None, width: int, height: int, plain: bool
) -> list[Text]:
    """A chart of one step: model data below, non-model data on top of them; phases underneath."""
    left = 11
    columns = max(8, width - left - 1)
    model, other = resampled(found, columns)
    top = max([a + b for a, b in zip(model, other, strict=True)], default=0) or 1
    full, over, blank = "#", "+", " "
    if not plain:
        full, over = "█", "▒"
    lines = []
    for row in range(height, 0, -1):
        level = top * (row - 0.5) / height
        label = size(top * row / height) if row in (height, (height + 1) // 2) else ""
        line = Text(f"{label:>{left - 1}} ", style="dim")
        cells = [full if a >= level else over if a + b >= level else blank for a, b in zip(model, other, strict=True)]
        for char, run in groupby(cells):
            line.append(char * len(list(run)), style={full: "cyan", over: "yellow"}.get(char, ""))
        lines.append(line)
    lines.append(Text(" " * left + phase_marks(found, columns), style="dim"))
    return lines


def describe_peak(found: Timeline, units: Sequence[str]) -> str:
    """Where the step needs most."""
    peak = found.peak
    index = found.unit[peak]
    unit = printable(units[index], 48) if 0 <= index < len(units) else "the end of the step"
    phase = {"f": "forward", "b": "backward"}.get(found.phase[peak], "")
    return f"peak {size(found.total_bytes[peak])} in {phase} of {unit}" if phase else f"peak at {unit}"


def resampled(found: Timeline, columns: int) -> tuple[list[int], list[int]]:
    """Model and non-model data by column of the chart; a column shows the highest of its moments."""
    length = len(found.phase)
    total = found.total_bytes
    model, other = [], []
    for column in range(min(columns, max(length, columns))):
        begin = column * length // columns
        end = max(begin + 1, (column + 1) * length // columns)
        best = max(range(begin, min(end, length)), key=total.__getitem__, default=length - 1)
        model.append(found.model_bytes[best])
        other.append(found.non_model_bytes[best])
    return model, other


def phase_marks(found: Timeline, columns: int) -> str:
    """``^forward    ^backward``, under the columns where they begin."""
    line = [" "] * columns
    before = ""
    for moment, letter in enumerate(found.phase):
        word = {"f": "^forward", "b": "^backward"}.get(letter, "") if letter != before else ""
        at = moment * columns // len(found.phase)
        # A recomputation in backward goes back and forth; only what has room is written.
        if word and at + len(word) <= columns and all(char == " " for char in line[at : at + len(word) + 1]):
            line[at : at + len(word)] = word
        before = letter
    return "".join(line)


def chunk_map(run: RunView, chunks: Description | None, width: int, height: int) -> list[Text]:
    """One letter a chunk, or one for several where there are more chunks than room."""
    letters = states_of(run.states)
    room = max(1, (width - 2) * height)
    each = -(-len(letters) // room) if letters else 1
    # Of the chunks in one cell the busiest is shown.
    order = "*>DHKdhk"
    cells = [min(letters[i : i + each], key=lambda c: order.find(c) % 99) for i in range(0, len(letters), each)]
    lines = []
    for begin in range(0, len(cells), width - 2):
        line = Text(" ")
        for letter, run_ in groupby(cells[begin : begin + width - 2]):
            style = MOVING if letter == ">" else IN_USE if letter == "*" else LETTERS.get(letter, "")
            line.append(letter * len(list(run_)), style=style)
        lines.append(line)
    return lines or [Text(" no chunk map recorded yet", style="dim")]


def map_note(run: RunView, wide: bool) -> str:
    return (
        "d device  h host  k disk   upper case: copy on device   > moving   * in use"
        if wide
        else "d/h/k home, UPPER on device, > moving"
    )


def homes(chunks: Sequence[DescribedChunk], width: int) -> Text:
    """How many masters, optimizer states (each by itself) and gradients of chunks are where."""
    of_label: dict[str, list[str | None]] = {
        "masters": [chunk.homes.get("master") for chunk in chunks],
        "states": [chunk.homes[state] for chunk in chunks for state in chunk.states],
        "gradients": [chunk.homes.get("gradient") for chunk in chunks],
    }
    parts = []
    for label, found in of_label.items():
        where = "  ".join(f"{tier} {found.count(tier)}" for tier in (*TIERS, DIVIDED) if found.count(tier))
        if where:
            parts.append(f"{label}: {where}")
    return Text((" " + "   ".join(parts))[:width], style="dim")


def moves(found: Rates, width: int) -> list[Text]:
    """Links on the left; needs and stalls on the right."""
    left = [
        f" {link.source + ' > ' + link.target:<15}{size(link.bytes_per_step):>10}/step"
        f"{size(link.bytes_per_second):>11}/s{_of_ceiling(link.bytes_per_second, link.ceiling)}"
        for link in found.links
    ] or [" nothing moves" if found.steps else " no second step to compare with yet"]
    needs = found.needs
    right = [
        f"needs a step: resident {count(needs.get('resident'))}  hit {count(needs.get('hit'))}"
        f"  late {count(needs.get('late'))}  miss {count(needs.get('miss'))}",
        f"waited {seconds(found.stall_seconds)} a step ({percent(found.stall_ratio)})"
        + (f", for {_worst(found)}" if found.stall_by_tier and found.stall_seconds else ""),
        f"not waited for {percent(found.hit_ratio)}   evictions {count(found.evictions)}/step",
    ]
    if found.disk_written_per_day:
        right.append(f"written to disk: {size(found.disk_written_per_day)} a day")
    if width < 100:
        return [Text(line[:width]) for line in [*left, *(f" {line}" for line in right[:2])]]
    rows, column = max(len(left), len(right)), max(58, *(len(line) + 2 for line in left))
    left += [""] * (rows - len(left))
    right += [""] * (rows - len(right))
    return [Text(f"{a:<{column}}{b}"[:width]) for a, b in zip(left, right, strict=True)]


def activations(stats: Mapping[str, float], width: int) -> list[Text]:
    """A line on tensors saved for backward, if any have left: where they are, and how often they were back in time."""
    if not stats.get("activation/leave_count"):
        return []
    needs = {name: stats.get(f"activation/{name}_count") or 0 for name in ("hit", "late", "miss")}
    total = sum(needs.values()) or 1
    waited = sum(stats.get(f"activation/{way}_wait_seconds") or 0 for way in ("leave", "return"))
    shares = "  ".join(f"{name} {percent(number / total)}" for name, number in needs.items())
    below = "  ".join(f"{tier} {size(stats.get(f'activation/{tier}_bytes'))}" for tier in ("host", "disk"))
    peak = size(stats.get("activation/below_peak_bytes"))
    line = f" saved tensors: below now {below}, at most {peak}   back {shares}   waited {seconds(waited)} in all"
    return [Text(line[:width])]


def _of_ceiling(speed: float | None, ceiling: float | None) -> str:
    return f" {percent(speed / ceiling, 0):>4} of {size(ceiling)}/s" if speed and ceiling else ""


def _worst(found: Rates) -> str:
    tier, waited = max(found.stall_by_tier.items(), key=lambda item: item[1])
    return f"{tier} {seconds(waited)}"


def advices(given: Sequence[Advice], width: int, limit: int) -> list[Text]:
    if not given:
        return [Text(" nothing to change", style="dim")]
    lines = []
    for advice in given[:limit]:
        line = Text(" ! " if advice.is_urgent else " - ", style="bold red" if advice.is_urgent else "yellow")
        if advice.arguments:  # first, because a narrow screen cuts the reason off
            line.append(f"{printable(advice.arguments)}  ", style="bold cyan")
        line.append(printable(advice.text), style="default")
        line.truncate(width)
        lines.append(line)
    return lines


def eta(run: RunView) -> str:
    total, step = run.identity.facts.get("steps"), run.step
    each = run.stats.get("step/seconds")
    if not isinstance(total, int) or step is None or not each or total <= step:
        return ""
    return f"eta {duration((total - step) * each)}"
