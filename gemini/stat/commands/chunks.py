"""``gemini-stat chunks``: the chunks as a table."""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemini.stat.console import Exit, console, find, print_json, show
from gemini.stat.outputs import Chunk, ChunkState, ChunkTable, RankChunks
from gemini.stat.over_ranks import Spread, spread
from gemini.stat.sight import read
from gemini.stat.text import UNKNOWN, percent, printable, size
from gemini.telemetry.documents import read_chunks, states_of
from gemini.telemetry.files import Unreadable
from gemini.telemetry.layout import TIERS
from gemini.telemetry.records import PLAIN_ROLES, Description
from gemini.telemetry.run_view import RunView

HELP = "The chunks: where their homes are, what is in them, what state they are in."
_SORTS: dict[str, Callable[[Chunk], float]] = {
    "index": lambda chunk: chunk.index,
    "bytes": lambda chunk: -chunk.home_bytes,
    "waste": lambda chunk: -chunk.waste_ratio,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tier", choices=TIERS, help="only chunks whose master is there")
    parser.add_argument("--state", choices=("home", "resident", "moving", "in-use"), help="only chunks in that state")
    parser.add_argument("--group", metavar="NAME", help="only chunks of that optimizer group, such as 0 or '-1 frozen'")
    parser.add_argument("--param", metavar="NAME", help="only chunks with a parameter whose name contains NAME")
    parser.add_argument("--sort", choices=_SORTS, default="index", help="index (default), bytes or waste")


def run(options: argparse.Namespace) -> Exit:
    path = find(options)
    sight = read(path, options)
    run = sight.run
    of_ranks = [] if sight.ranks is None else [_of_rank(path, view, options) for view in sight.ranks.views]
    rows = of_ranks[0].chunks if of_ranks else _of_rank(path, run, options).chunks
    if options.json:
        print_json(ChunkTable(run.identity.run_id, run.rank, run.states, rows, of_ranks))
    else:
        show(console(options), _table([Beside.of(row, of_ranks) for row in rows]))
    return Exit.OK


def _of_rank(path: Path, run: RunView, options: argparse.Namespace) -> RankChunks:
    chunks = read_chunks(path, run.rank)
    if chunks is None:
        raise Unreadable(
            f"{path} has no description of the chunks of rank {run.rank}: an older version wrote it, "
            "or it has not begun"
        )
    rows = [row for row in rows_of(chunks, run.states) if _matches(row, options)]
    return RankChunks(run.rank, run.states, sorted(rows, key=_SORTS[options.sort]))


def rows_of(description: Description, chunk_map: str) -> list[Chunk]:
    """The chunks in order, each with its state in the map and the names of its parameters."""
    states = states_of(chunk_map)
    return [
        Chunk(
            index=index,
            numel=chunk.numel,
            waste_ratio=1 - chunk.used_numel / chunk.numel if chunk.numel else 0.0,
            home_bytes=sum(chunk.home_bytes.values()),
            full_bytes=chunk.full_bytes,
            homes=chunk.homes,
            group=chunk.group,
            state=_state_of(states[index : index + 1]),
            parameters=names,
        )
        for index, (chunk, names) in enumerate(zip(description.chunks, description.names_by_chunk(), strict=True))
    ]


def _state_of(letter: str) -> ChunkState | None:
    if letter == ">":
        return "moving"
    if letter == "*":
        return "in use"
    return None if not letter else "resident" if letter.isupper() else "home"


def _matches(row: Chunk, options: argparse.Namespace) -> bool:
    if options.tier is not None and options.tier not in row.homes.get("master", "").split("+"):
        return False
    if options.state is not None and row.state != options.state.replace("-", " "):
        return False
    if options.group is not None and row.group != options.group:
        return False
    return options.param is None or any(options.param in name for name in row.parameters)


class Beside(NamedTuple):
    """A chunk with what the same one is on other ranks, each of which keeps a part of it."""

    chunk: Chunk
    states: Mapping[str, int]
    """Ranks by the chunk's state with them."""
    homes: Spread | None
    """Bytes of homes over ranks; None where one is shown by itself."""
    tiers: Sequence[str]
    """Of the masters."""

    @staticmethod
    def of(chunk: Chunk, ranks: Sequence[RankChunks]) -> "Beside":
        same = {each.rank: row for each in ranks for row in each.chunks if row.index == chunk.index}
        rows = list(same.values()) or [chunk]
        return Beside(
            chunk,
            Counter(row.state or UNKNOWN for row in rows),
            spread({rank: float(row.home_bytes) for rank, row in same.items()}),
            list(dict.fromkeys(row.homes.get("master", UNKNOWN) for row in rows)),
        )


def _table(rows: Sequence[Beside]) -> Any:
    from rich.table import Table

    is_ranked = any(row.homes is not None for row in rows)
    homes = ("min homes", "median", "max") if is_ranked else ("homes",)
    cells = [("chunk", "state", *homes, "waste", "master", "states", "parameters"), *map(_cells, rows)]
    table = Table.grid(padding=(0, 2), pad_edge=False, expand=True)
    for column, is_number in enumerate((True, False, *(True for _ in homes), True, False, False)):
        # Where the terminal is narrow, only names of parameters are cut.
        width = max(len(row[column]) for row in cells)
        table.add_column(justify="right" if is_number else "left", no_wrap=True, min_width=width)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for number, row in enumerate(cells):
        table.add_row(*row, style=None if number else "dim")
    return table


def _cells(beside: Beside) -> Sequence[str]:
    row = beside.chunk
    names, homes, over = row.parameters, row.homes, beside.homes
    state = next(iter(beside.states), UNKNOWN)
    if len(beside.states) > 1:
        state = ", ".join(f"{number} {name}" for name, number in beside.states.items())
    states = dict.fromkeys(tier for role, tier in homes.items() if role not in PLAIN_ROLES)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        str(row.index),
        state,
        *([size(row.home_bytes)] if over is None else map(size, (over.min, over.median, over.max))),
        percent(row.waste_ratio),
        printable(", ".join(beside.tiers), 20),
        printable(", ".join(states), 24) or UNKNOWN,
        printable(names[0], 60) + more if names else UNKNOWN,
    )
