"""The largest GPT under a cap on RAM, with a disk: does it train, with which numbers, and is it as fast as the disk?

    python scripts/bench/capacity.py [--layers 24 --hidden 2048 --cap 4GiB --folder FOLDER]

Each run is a child under ``RLIMIT_DATA``, set before it imports anything; the plugin gets ``offload_dir`` and nothing
else. Three questions, and the exit code says whether all were answered well:

- a model that needs the disk under the cap, and does not without it, trains with the same losses, ``==``;
- the large model trains, within the cap and the disk space allowed; plain PyTorch (bf16 with fp32 masters) does not;
- its steps take at most 1.2 times as long as their disk traffic alone takes at the speed of this disk, which is
  measured before and after, in the same mix of reading and writing (`disk.mixed_rate`).

Minutes, and some 20 GB of disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from disk import mixed_rate

ROOT = Path(__file__).resolve().parents[2]
ALLOWED_RATIO = 1.2
ALLOWED_DISK_BYTES = 40 * 10**9
POLL_SECONDS = 0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after a first one for warming up")
    parser.add_argument("--cap", default="4GiB")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to use")
    parser.add_argument("--skip-equality", action="store_true", help="only the large model")
    parser.add_argument(
        "--compare-backward", action="store_true", help="only the large model, the normal step and update_in_backward"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return 0
    sys.path.insert(0, str(ROOT))
    from gemini.sizes import parse_bytes

    asked = {name: getattr(options, name) for name in ("layers", "hidden", "batch_size", "seq_len", "steps")}
    asked |= {"kind": "managed", "folder": str(options.folder), "cap": parse_bytes(options.cap)}
    if options.compare_backward:
        return compare_backward(asked)
    answers = []

    def check(what: str, holds: bool) -> None:
        answers.append(holds)
        print(f"{'ok  ' if holds else 'FAIL'}  {what}", flush=True)

    if not options.skip_equality:
        smaller = {**asked, "layers": 6, "hidden": 2048, "steps": 2}
        capped, free = run(smaller), run({**smaller, "cap": None})
        if "error" in capped or "error" in free:
            check(f"the smaller model ends with {capped.get('error')}, {free.get('error')}", False)
        else:
            check(
                f"{capped['parameters'] / 1e6:.0f}M parameters, {capped['disk_used'] / 1e9:.1f} GB on disk under the "
                f"cap, {free['disk_used'] / 1e9:.1f} GB without: losses {capped['losses']} and {free['losses']}",
                capped["losses"] == free["losses"] and capped["disk_used"] > 0 == free["disk_used"],
            )
    plain = run({**asked, "kind": "plain", "steps": 1})
    check(f"plain PyTorch under the cap: {plain.get('error', 'trains')}", "error" in plain)
    # Reads are 0.55 of the traffic of a step, more or less; known better afterwards.
    rates = [mixed_rate(options.folder, 0.55)]
    large = run(asked)
    if "error" in large:
        check(f"the large model ends with {large['error']}", False)
        return 1
    traffic = large["read_bytes"] + large["written_bytes"]
    rates.append(mixed_rate(options.folder, large["read_bytes"] / traffic))
    rate = sum(rates) / 2
    count = large["parameters"]
    check(f"{count / 1e6:.0f}M parameters, {options.steps + 1} steps, losses {large['losses']}", count >= 1.2e9)
    check(
        f"peak VmData {large['peak_data'] / 2**20:.0f} MiB of {asked['cap'] / 2**20:.0f}, "
        f"{large['disk_used'] / 1e9:.1f} GB of disk, boost took {large['boost_seconds']:.1f} s",
        large["disk_used"] <= ALLOWED_DISK_BYTES,
    )
    alone = traffic / rate
    print(
        f"      a step moves {traffic / 1e9:.1f} GB, {traffic / count:.1f} bytes a parameter "
        f"({large['read_bytes'] / count:.1f} read); the disk's speed in this mix is "
        f"{' and '.join(f'{r / 1e9:.2f}' for r in rates)} GB/s before and after"
    )
    seconds = statistics.median(large["step_seconds"])
    check(
        f"a step takes {seconds:.1f} s (median of {[round(s, 1) for s in large['step_seconds']]}), "
        f"{seconds / alone:.2f} times the {alone:.1f} s of its traffic alone (at most {ALLOWED_RATIO})",
        seconds / alone <= ALLOWED_RATIO,
    )
    return 0 if all(answers) else 1


def compare_backward(asked: dict[str, Any]) -> int:
    """The normal step and ``update_in_backward``, by turns, twice each."""
    names = {False: "normal step", True: "update_in_backward"}
    results: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for _ in range(2):
        for in_backward in names:
            result = run({**asked, "update_in_backward": in_backward})
            if "error" in result:
                print(f"FAIL  {names[in_backward]} ends with {result['error']}")
                return 1
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
    same = {tuple(result["losses"]) for each in results.values() for result in each}
    print(f"{'ok  ' if len(same) == 1 else 'FAIL'}  the losses are the same")
    print(f"      update_in_backward takes {medians[True] / medians[False]:.2f} times as long")
    return 0 if len(same) == 1 else 1


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """What the child printed last, with the highest VmData seen from here; ``error`` if it did not get there."""
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
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


def child(asked: dict[str, Any]) -> None:
    import resource

    if asked["cap"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (asked["cap"],) * 2)
    import torch

    from gemini.train.model import GPT2LMHeadModel, GPTConfig

    torch.manual_seed(0)
    config = GPTConfig(
        layers=asked["layers"], hidden=asked["hidden"], heads=asked["hidden"] // 64, seq_len=asked["seq_len"]
    )
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(0, 256, (asked["batch_size"], asked["seq_len"]), generator=generator)
        for _ in range(asked["steps"] + 1)
    ]
    if asked["kind"] == "plain":
        plain(GPT2LMHeadModel(config), batches)
        return
    managed(config, batches, asked["folder"], asked.get("update_in_backward", False))


def plain(model: Any, batches: list[Any]) -> None:
    """bf16 with fp32 masters, as written by hand."""
    import torch

    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    losses = []
    for batch in batches:
        loss = model(batch, batch)
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
                master.grad = None
        losses.append(float(loss.detach()))
    print(json.dumps({"losses": losses}))


def managed(config: Any, batches: list[Any], folder: str, update_in_backward: bool) -> None:
    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam
    from gemini.train.model import GPT2LMHeadModel

    begin = time.perf_counter()
    with LazyInitContext():
        model: Any = GPT2LMHeadModel(config)
    count = sum(p.numel() for p in model.parameters())
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-4)
    with tempfile.TemporaryDirectory(dir=folder) as offload_dir:
        booster = Booster(plugin=GeminiPlugin(offload_dir=offload_dir, update_in_backward=update_in_backward))
        model, optimizer, *_ = booster.boost(model, optimizer)
        boost_seconds = time.perf_counter() - begin
        losses, ends, moved = [], [], []
        for batch in batches:
            loss = model(batch, batch)
            booster.backward(loss, optimizer)
            losses.append(float(loss.detach()))
            # From the end of a backward to the end of the next: an update, a forward and a backward, with their I/O.
            stats = model.memory_stats()
            ends.append(time.perf_counter())
            moved.append((stats["move/disk_read_bytes"], stats["move/disk_write_bytes"]))
            optimizer.step()
            optimizer.zero_grad()
        list(model.named_parameters())  # waits for the last updates
        after = model.memory_stats()
    print(
        json.dumps(
            {
                "parameters": count,
                "losses": losses,
                "boost_seconds": boost_seconds,
                "step_seconds": [later - earlier for earlier, later in pairwise(ends)],
                "read_bytes": (moved[-1][0] - moved[0][0]) / (len(moved) - 1),
                "written_bytes": (moved[-1][1] - moved[0][1]) / (len(moved) - 1),
                "gradient_bytes": after["model_data/gradient_bytes"],
                "disk_used": after["disk/used_bytes"],
                "host_capacity": after["host/capacity_bytes"],
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
