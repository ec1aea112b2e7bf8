"""The largest GPT under a cap on RAM, with a disk: does it train, with which numbers, and is it as fast as the disk?

    python scripts/bench capacity [--layers 24 --hidden 2048 --cap 4GiB --disk FOLDER]
    python scripts/bench capacity --largest --hidden 1024 --cap 1GiB     how many layers ours and plain PyTorch train

Each run is a child under ``RLIMIT_DATA``, set before it imports anything; the plugin gets ``offload_dir`` and nothing
else. Three questions, and the exit code says whether all were answered well:

- a model that needs the disk under the cap, and does not without it, trains with the same losses, ``==``;
- the large model trains, within the cap and the disk space allowed; plain PyTorch (bf16 with fp32 masters) does not;
- its steps take at most 1.2 times as long as their disk traffic alone takes at the speed of this disk, which is
  measured before and after, reading and writing at once (`disk_rate.mixed_rate`).

Minutes, and some 20 GB of disk. ``--largest`` finds the number of layers by bisection; a model counts if it trains two
steps. ``--most-layers`` and ``--disk-bytes`` bound what is tried.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
from disk_rate import SECONDS, SPAN_BYTES, mixed_rate

from gemini.sizes import parse_bytes

CHILD = Path(__file__).with_name("capacity_child.py")
ROOT = Path(__file__).resolve().parents[2]
ALLOWED_RATIO = 1.2
ALLOWED_DISK_BYTES = 40 * 10**9
POLL_SECONDS = 0.005
PLAIN, OURS = "plain", "ours"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after a first one for warming up")
    parser.add_argument("--cap", type=parse_bytes, default=4 << 30, help="of RAM (RLIMIT_DATA), such as 4GiB")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to use")
    parser.add_argument("--span", type=int, default=SPAN_BYTES, help="bytes of the file that the disk is measured with")
    parser.add_argument("--skip-equality", action="store_true", help="only the large model")
    parser.add_argument(
        "--compare-backward", action="store_true", help="only the large model, the normal step and update_in_backward"
    )
    parser.add_argument("--largest", action="store_true", help="find the most layers that train under the cap")
    parser.add_argument("--most-layers", type=int, default=1024, help="no more are tried")
    parser.add_argument("--disk-bytes", type=parse_bytes, default=ALLOWED_DISK_BYTES, help="of ours, with --largest")


def run(options: argparse.Namespace) -> dict[str, object]:
    options.disk.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(options, name) for name in ("layers", "hidden", "batch_size", "seq_len", "steps", "cap")}
    asked |= {"kind": "managed", "folder": str(options.disk)}
    if options.largest:
        return _largest(options, asked)
    if options.compare_backward:
        return _compare_backward(asked)
    return _check(options, asked)


def _largest(options: argparse.Namespace, asked: dict[str, Any]) -> dict[str, object]:
    kinds = {PLAIN: {"kind": "plain"}, OURS: {"disk_bytes": options.disk_bytes}}
    results: dict[str, dict[str, Any]] = {}
    for name, different in kinds.items():
        tried: dict[int, dict[str, Any]] = {}

        def trains(
            layers: int, tried: dict[int, dict[str, Any]] = tried, different: dict[str, Any] = different
        ) -> bool:
            tried[layers] = train({**asked, **different, "layers": layers, "steps": 1})
            return "error" not in tried[layers]

        best = most_layers(trains, options.most_layers)
        results[name] = {"layers": best, **tried.get(best, {"parameters": 0}), "tried": tried}
    print(
        f"width {options.hidden}, batch {options.batch_size} x {options.seq_len}, RLIMIT_DATA of "
        f"{options.cap / 2**20:.0f} MiB, disk of {options.disk_bytes / 1e9:.0f} GB"
    )
    base = results[PLAIN]["parameters"]
    table = [
        {
            "run": name,
            "layers": str(found["layers"]),
            "M parameters": f"{found['parameters'] / 1e6:.1f}",
            "to plain": f"{found['parameters'] / base:.1f}" if base else report.UNKNOWN,
            "on disk GB": f"{found.get('disk_used', 0) / 1e9:.2f}",
            "peak VmData MiB": str(found.get("peak_data", 0) >> 20),
            "first that failed": next(
                (f"{n}: {found['tried'][n]['error']}" for n in sorted(found["tried"]) if "error" in found["tried"][n]),
                "none was tried",
            )[:60],
        }
        for name, found in results.items()
    ]
    return {"table": table, "rows": results, "ok": results[OURS]["layers"] > 0}


def most_layers(trains: Callable[[int], bool], most: int) -> int:
    """The most layers that train, 0 if not even one does: doubled until they fail, then by halves."""
    low, high = 0, 1
    while high <= most and trains(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    return low


def _check(options: argparse.Namespace, asked: dict[str, Any]) -> dict[str, object]:
    answers: dict[str, bool] = {}

    def check(what: str, holds: bool) -> None:
        answers[what] = holds
        print(f"{'ok  ' if holds else 'FAIL'}  {what}", flush=True)

    if not options.skip_equality:
        smaller = {**asked, "layers": 6, "hidden": 2048, "steps": 2}
        capped, free = train(smaller), train({**smaller, "cap": None})
        if "error" in capped or "error" in free:
            check(f"the smaller model ends with {capped.get('error')}, {free.get('error')}", False)
        else:
            check(
                f"{capped['parameters'] / 1e6:.0f}M parameters, {capped['disk_used'] / 1e9:.1f} GB on disk under the "
                f"cap, {free['disk_used'] / 1e9:.1f} GB without: losses {capped['losses']} and {free['losses']}",
                capped["losses"] == free["losses"] and capped["disk_used"] > 0 == free["disk_used"],
            )
    plain = train({**asked, "kind": "plain", "steps": 1})
    check(f"plain PyTorch under the cap: {plain.get('error', 'trains')}", "error" in plain)
    rates = [mixed_rate(options.disk, options.span, SECONDS)]
    large = train(asked)
    if "error" in large:
        check(f"the large model ends with {large['error']}", False)
        return {"ok": False, "answers": answers, "large": large}
    traffic = large["read_bytes"] + large["written_bytes"]
    rates.append(mixed_rate(options.disk, options.span, SECONDS))
    count = large["parameters"]
    check(f"{count / 1e6:.0f}M parameters, {options.steps + 1} steps, losses {large['losses']}", True)
    check(
        f"peak VmData {large['peak_data'] / 2**20:.0f} MiB of {asked['cap'] / 2**20:.0f}, "
        f"{large['disk_used'] / 1e9:.1f} GB of disk, boost took {large['boost_seconds']:.1f} s",
        large["disk_used"] <= ALLOWED_DISK_BYTES,
    )
    alone = traffic / statistics.fmean(rates)
    print(
        f"      a step moves {traffic / 1e9:.1f} GB, {traffic / count:.1f} bytes a parameter "
        f"({large['read_bytes'] / count:.1f} read); the disk's speed, reading and writing at once, is "
        f"{' and '.join(f'{r / 1e9:.2f}' for r in rates)} GB/s before and after"
    )
    seconds = statistics.median(large["step_seconds"])
    check(
        f"a step takes {seconds:.1f} s (median of {[round(s, 1) for s in large['step_seconds']]}), "
        f"{seconds / alone if alone else 0:.2f} times the {alone:.1f} s of its traffic alone (at most {ALLOWED_RATIO})",
        seconds <= ALLOWED_RATIO * alone,
    )
    return {"ok": all(answers.values()), "answers": answers, "large": large, "mixed_bytes_per_second": rates}


def _compare_backward(asked: dict[str, Any]) -> dict[str, object]:
    """The normal step and ``update_in_backward``, by turns, twice each."""
    names = {False: "normal step", True: "update_in_backward"}
    results: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for _ in range(2):
        for in_backward in names:
            result = train({**asked, "update_in_backward": in_backward})
            if "error" in result:
                print(f"FAIL  {names[in_backward]} ends with {result['error']}")
                return {"ok": False, "error": result["error"]}
            results[in_backward].append(result)
    medians = {}
    for in_backward, name in names.items():
        one = results[in_backward][0]
        seconds = [s for result in results[in_backward] for s in result["step_seconds"]]
        medians[in_backward] = statistics.median(seconds)
        peak = max(result["peak_data"] for result in results[in_backward])
        print(
            f"      {name}: {one['parameters'] / 1e6:.0f}M parameters, {medians[in_backward]:.2f} s a step (median of "
            f"{[round(s, 2) for s in seconds]}), reads {one['read_bytes'] / 1e9:.2f} GB and writes "
            f"{one['written_bytes'] / 1e9:.2f} GB, {one['disk_used'] / 1e9:.1f} GB on disk, "
            f"{one['gradient_bytes'] / 2**20:.0f} MiB for gradients, peak VmData {peak / 2**20:.0f} MiB"
        )
    same = len({tuple(result["losses"]) for each in results.values() for result in each}) == 1
    print(f"{'ok  ' if same else 'FAIL'}  the losses are the same")
    print(f"      update_in_backward takes {medians[True] / medians[False]:.2f} times as long")
    return {"ok": same, "rows": {names[key]: found for key, found in results.items()}}


def train(asked: dict[str, Any]) -> dict[str, Any]:
    """What the child printed last, with the highest VmData seen from here; ``error`` if it did not get there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, CHILD, json.dumps(asked)], stdout=out, stderr=out, env=environment)
        peak = 0
        while process.poll() is None:
            peak = max(peak, data_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        out.seek(0)
        last = (out.read().decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
    try:
        return {**json.loads(last), "peak_data": peak}
    except ValueError:
        return {"error": last[:160]}


def data_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)
