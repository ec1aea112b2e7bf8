"""A long training to which everything happens: bit-equal to plain PyTorch all along, in bounded memory.

Training, evaluation, saving (also in the background) and loading, batches of many shapes, exceptions and Ctrl-C in
forward and backward, other budgets, models made and dropped, parameters read and written. Plain PyTorch does the same
first. Every some steps, at rest, the system is asked:

- what is resident beside our ledger's bytes has no slope that is more than noise (an interval of 95 %), and stays
  within some MiB: so the ledger is right, too;
- descriptors and threads are as many as ever at this placement.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from array import array
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve()
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "16",
}
"""A malloc that gives back what is freed: what is left over is a leak then, and not a hole between two blocks. And
small caches of oneDNN, which keeps some KiB for each shape that it has met: they are full from the start."""

NOTHING_BYTES = 64
"""A step. The slope of what is resident beside the ledger has to be within noise of at most this, or of what plain
PyTorch has in the same loop: the lower end of its interval of 95 % counts."""
SLOPE_BYTES = 512
"""A step, at most, however wide the interval is: 1 MiB over 2,000 steps, of about 280 MiB."""
BAND_BYTES = 4 << 20
"""How far what is resident beside the ledger may be from its median at rest."""
_WARM_UP_SHARE = 0.3
"""Of the steps: until then each kind of event and each placement has been there for the first time."""
_TELLING = 500
"""Runs of at least this number of steps say how far they are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from soaking.events import WEIGHTS

    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=20, metavar="N", help="steps between two looks (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--events", nargs="+", metavar="KIND", default=list(WEIGHTS), choices=list(WEIGHTS), help="only these kinds"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as SVG")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    asked = {
        "steps": arguments.steps,
        "every": arguments.every,
        "seed": arguments.seed,
        "events": arguments.events,
        "plot": None if arguments.plot is None else str(arguments.plot.absolute()),
    }
    paths = [str(HERE.parent), str(HERE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **_QUIET, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory(prefix="gemini-memory-soak-") as folder:
        environment["XDG_STATE_HOME"] = folder
        done = subprocess.run(
            [sys.executable, str(HERE), json.dumps({**asked, "folder": folder})],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode != 0:
        return {"ok": False, "error": f"the soak ended with {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# -- in a process with a quiet malloc


def _soak(asked: dict[str, Any]) -> dict[str, Any]:
    from soaking import plot
    from soaking.events import drawn
    from soaking.readings import Reading, read, thread_names
    from soaking.sides import Ours, Plain

    gc.freeze()  # what is imported need not be looked at in each collection
    events = drawn(asked["steps"], asked["seed"], asked["events"])
    folder = Path(asked["folder"])
    plain: Any = Plain(folder / "plain")
    control = list[Reading]()
    wanted = array("d", [0.0]) * len(events)  # has its memory now, so that what is measured does not grow with it
    for position, event in enumerate(events):
        wanted[position] = plain.happen(event)
        if event.number % asked["every"] == asked["every"] - 1:
            control.append(read(event.number + 1, "plain", 0))
    weights = {name: value.clone() for name, value in plain.model.state_dict().items()}
    del plain
    ours = Ours(folder / "ours")
    readings: list[Reading] = []
    for event, value in zip(events, wanted, strict=True):
        if asked["steps"] >= _TELLING and event.number % (asked["steps"] // 10) == 0:
            print(f"step {event.number} of {asked['steps']}", file=sys.stderr, flush=True)
        got = ours.happen(event)
        if got != value:
            return {"ok": False, "different_at": asdict(event), "placement": ours.placement, "got": got, "want": value}
        if event.number % asked["every"] == asked["every"] - 1:
            readings.append(read(event.number + 1, ours.placement, ours.rest()))
    same = all(bool((value == weights[name]).all()) for name, value in ours.model.state_dict().items())
    of_plain = judged(control)
    found = judged(readings, of_plain["interval_bytes_a_step"][1])
    if asked["plot"] is not None:
        title = f"{asked['steps']} steps: {found['slope_bytes_a_step']:+.0f} bytes a step beside the ledger"
        plot.draw(Path(asked["plot"]), readings, title)
    return {
        "ok": found["ok"] and same,
        "steps": len(events),
        "events": dict(Counter(event.kind for event in events)),
        "equal": same,
        **{name: value for name, value in found.items() if name != "ok"},
        "plain": {name: value for name, value in of_plain.items() if name.startswith(("slope", "interval"))},
        "thread_names": thread_names(),
        "readings": [asdict(reading) for reading in readings],
    }


def judged(readings: list[Any], of_plain_bytes: float = 0.0) -> dict[str, Any]:
    """Whether all stays as it is, by readings at rest; the first of them are warm-up.

    Parameters
    ----------
    of_plain_bytes
        The upper end of plain PyTorch's slope: that much is noise.
    """
    from soaking.readings import interval, slope

    steady = readings[int(_WARM_UP_SHARE * len(readings)) :]
    by_placement = [[r for r in steady if r.placement == name] for name in sorted({r.placement for r in steady})]
    points = {
        name: [[(reading.step, getattr(reading, name)) for reading in each] for each in by_placement]
        for name in ("beside_bytes", "resident_bytes", "data_bytes", "malloc_bytes", "python_blocks")
    }
    beside = slope(points["beside_bytes"])
    lower, upper = interval(points["beside_bytes"])
    middle = median(reading.beside_bytes for reading in steady)
    band = max(abs(reading.beside_bytes - middle) for reading in steady)
    kinds = {
        what: {
            placement: sorted({getattr(reading, what) for reading in steady if reading.placement == placement})
            for placement in {reading.placement for reading in steady}
        }
        for what in ("descriptors", "threads")
    }
    constant = {what: all(len(seen) == 1 for seen in of.values()) for what, of in kinds.items()}
    return {
        "ok": lower <= max(NOTHING_BYTES, of_plain_bytes)
        and abs(beside) <= SLOPE_BYTES
        and band <= BAND_BYTES
        and all(constant.values()),
        "slope_bytes_a_step": beside,
        "interval_bytes_a_step": [lower, upper],
        "slope_of_resident_bytes_a_step": slope(points["resident_bytes"]),
        "slope_of_vmdata_bytes_a_step": slope(points["data_bytes"]),
        "slope_of_malloc_bytes_a_step": slope(points["malloc_bytes"]),
        "slope_of_python_blocks_a_step": slope(points["python_blocks"]),
        "beside_the_ledger_bytes": middle,
        "furthest_from_it_bytes": band,
        **kinds,
    }


if __name__ == "__main__":
    print(json.dumps(_soak(json.loads(sys.argv[1]))))
