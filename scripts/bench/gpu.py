"""All that a machine with a GPU is asked for, in one command and under 10 minutes; in small on any machine.

    scripts/gpu                              or: python scripts/bench gpu
    scripts/gpu --reduced                    the same code in small, under a minute: on the CPU, or what is there
    scripts/gpu --reduced --device sim       on the simulated device of docs/simulated-device.md

Parts, each in a process of its own with a time that it may take: the tests that are marked ``gpu``; bytes a second of
kernels, of copies and of the link; steps of a 1.3B and a 7B GPT with model data on the device (resident), with homes in
RAM (host) and with full copies that come and go, too (streamed), at 4k, 16k and 32k tokens; FSDP2, DeepSpeed, torchao
and bitsandbytes beside them where they are installed; the largest GPT that trains; a trace for chrome://tracing with
the share of the moves that lies beside kernels. What fails, takes too long or is not there is told in its row, and the
others go on. In ``--out``: ``gpu.json``, ``gpu.md`` with the table, ``trace.json``, and a log for each part.
"""

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_tests
import record
import report
from gpu_settings import FULL, REDUCED, Settings
from part_process import run_part

WORKER = Path(__file__).with_name("gpu_part.py")
PLACEMENTS = ("resident", "host", "streamed")
PEERS = {
    "plain PyTorch": "torch",
    "FSDP2, CPU offload": "torch",
    "ZeRO-2, optimizer on CPU": "deepspeed",
    "ZeRO-3, all on CPU": "deepspeed",
    "torchao's CPUOffloadOptimizer (bf16 masters)": "torchao",
    "bitsandbytes' PagedAdamW8bit (bf16 masters)": "bitsandbytes",
}
"""By name, the package that each needs."""
KINDS = ("tests", "bandwidth", "step", "peer", "largest", "trace")
LEAST_SECONDS = 3.0
"""A part with less is not begun."""

Found = list[dict[str, Any]]
"""The answers of a part."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reduced", action="store_true", help="in small, for any machine")
    parser.add_argument("--device", choices=("auto", "sim", "cpu"), default="auto")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS), help="these kinds of parts")
    parser.add_argument("--minutes", type=float, help="for all together [9.5, reduced 0.9]")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: other sizes, see gpu_settings.py")
    parser.add_argument("--out", type=Path, default=Path("gemini_memory_runs/gpu"), help="folder for what it writes")


def run(options: argparse.Namespace) -> dict[str, object]:
    options.out.mkdir(parents=True, exist_ok=True)
    settings = replace(REDUCED if options.reduced else FULL, **options.settings)
    minutes = options.minutes or (0.9 if options.reduced else 9.5)
    deadline = time.monotonic() + 60 * minutes
    parts: dict[str, Found] = {}
    seconds: dict[str, float] = {}
    for name, (kind, allowed, act) in _parts(options, settings).items():
        left = min(allowed, deadline - time.monotonic())
        begin = time.monotonic()
        parts[name] = act(left) if left > LEAST_SECONDS else [{"absent": "no time was left"}]
        seconds[name] = time.monotonic() - begin
        print(f"{name}: {_summary(kind, parts[name])} ({seconds[name]:.0f} s)", file=sys.stderr, flush=True)
    table = [row for name, found in parts.items() for row in rows(name, found)]
    failed = [name for name, found in parts.items() if any("error" in each for each in found)]
    result: dict[str, Any] = {"table": table, "reduced": options.reduced, "failed": failed}
    result |= {"parts": parts, "part_seconds": seconds}
    found = {"benchmark": "gpu", "machine": report.machine(), **result}
    record.write(found, options.out / "gpu.json")
    (options.out / "gpu.md").write_text(report.markdown(table) + "\n")
    print(f"written to {options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
    return result


def _parts(options: argparse.Namespace, settings: Settings) -> dict[str, tuple[str, float, Callable[[float], Found]]]:
    """By name: kind, seconds, and what runs it. Those that matter most are first, should the time not do for all."""
    asked = {"device": options.device, "reduced": options.reduced, "settings": options.settings}

    def worker(name: str, **more: Any) -> Callable[[float], Found]:
        log = options.out / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.log"
        return partial(run_part, [sys.executable, WORKER, json.dumps({**asked, **more})], log)

    limits = settings.part_seconds
    found: dict[str, Any] = {}
    found["tests"] = ("tests", limits["tests"], partial(gpu_tests.run, options.out / "tests.log"))
    found["bandwidth"] = ("bandwidth", limits["bandwidth"], worker("bandwidth", part="bandwidth"))
    trace = {"part": "trace", "size": settings.sizes[0].name, "file": str(options.out / "trace.json")}
    found["trace"] = ("trace", limits["trace"], worker("trace", **trace))
    for size in settings.sizes:
        for placement in PLACEMENTS:
            name = f"{size.name}, {placement}"
            act = worker(name, part="step", size=size.name, placement=placement)
            found[name] = ("step", limits[f"step {size.name}"], act)
    largest = partial(_largest, settings, lambda layers: worker(f"{layers} layers", part="largest", layers=layers))
    found["largest"] = ("largest", limits["largest"], largest)
    for peer, package in PEERS.items():
        name = f"{settings.sizes[0].name}, {peer}"
        act = worker(name, part="peer", size=settings.sizes[0].name, peer=peer)
        if importlib.util.find_spec(package) is None:
            act = partial(_absent, f"{package} is not installed")
        found[name] = ("peer", limits["peer"], act)
    return {name: part for name, part in found.items() if part[0] in options.only}


def _absent(why: str, seconds: float) -> Found:
    return [{"absent": why}]


def _largest(settings: Settings, trial: Callable[[int], Callable[[float], Found]], seconds: float) -> Found:
    """The most layers that train, doubled until they fail, then by halves, as long as there is time."""
    deadline = time.monotonic() + seconds
    low, high, best, why = 0, 1, None, "no time was left"
    failed = settings.most_layers + 1
    while high < failed and (left := deadline - time.monotonic()) > LEAST_SECONDS:
        answers = trial(high)(left)
        if answers and "error" not in answers[-1]:
            low, best = high, answers[-1]
        else:
            failed = high
            why = str(answers[-1].get("error", "no answer")) if answers else "no answer"
        high = min(2 * low, failed - 1, settings.most_layers) if failed > settings.most_layers else (low + failed) // 2
        if high <= low:
            break
    ended = "most that is tried" if low == settings.most_layers else f"more fails or was not tried: {why}"
    return [{**(best or {"error": why}), "ended": ended}]


def rows(name: str, found: Found) -> list[dict[str, str]]:
    """The table's rows of one part."""
    told = [_row(name, answer) for answer in found]
    return [row for row in told if row is not None] or [_line(name, report.UNKNOWN, "no answer")]


def _row(name: str, answer: Mapping[str, Any]) -> dict[str, str] | None:
    what = f"{name}{', ' + answer['what'] if 'what' in answer else ''}"
    if "tokens" in answer:
        what += f", {answer['tokens']} tokens"
    if "error" in answer:
        return _line(what, "failed", str(answer["error"]).splitlines()[0][:80])
    if "absent" in answer:
        return _line(what, report.UNKNOWN, answer["absent"])
    if "gb_per_second" in answer:
        return _line(what, f"{answer['gb_per_second']:.2f} GB/s", answer.get("way", ""))
    if "layers" in answer:
        return _line(
            what, f"{answer['parameters'] / 1e6:.1f} M parameters", f"{answer['layers']} layers; {answer['ended']}"
        )
    if "seconds" in answer:
        peak = answer.get("device_peak_bytes")
        more = f"{answer['tokens_per_second']:.0f} tokens/s, {answer['tflops']:.2f} TFLOP/s"
        return _line(what, f"{1e3 * answer['seconds']:.0f} ms", f"{more}{f', {peak / 2**30:.1f} GiB' if peak else ''}")
    if "passed" in answer:
        return _line(what, f"{answer['passed']} passed", f"{answer['failed']} failed, {answer['skipped']} skipped")
    if "trace" in answer:
        share = answer["moves_beside_kernels"]
        beside = "no moves by the device" if share is None else f"{share:.1%} of moves beside kernels"
        return _line(what, beside, f"{answer['prefetch_hit_ratio']:.1%} prefetched; {Path(answer['trace']).name}")
    if "device" in answer:
        return _line(what, answer["device"], str(answer.get("name", "")))
    return None  # how long building took


def _line(what: str, value: str, more: str) -> dict[str, str]:
    return {"what": what, "value": value, "more": more.replace("|", "/") or report.UNKNOWN}


def _summary(kind: str, found: Found) -> str:
    if not found:
        return "no answer"
    return next((f"failed: {each['error']}"[:160] for each in found if "error" in each), found[-1].get("absent", "ok"))
