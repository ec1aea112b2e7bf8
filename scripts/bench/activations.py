"""The longest sequence and the largest batch that a GPT trains under a cap on RAM, by what becomes of its activations.

    python scripts/bench activations [--layers 12 --hidden 768 --cap 1.5GiB --folder FOLDER]

Each trial is a child under ``RLIMIT_DATA``, set before it imports anything. All of them have their model data on our
tiers, with a disk; they differ in what becomes of tensors that are saved for backward:

- ``keep``: they stay (``activation_policy="keep"``);
- ``checkpoint``: each block is checkpointed by torch (``torch.utils.checkpoint``), which keeps the blocks' inputs;
- ``auto``: ``activation_policy="auto"``.

Losses are compared first, with ``==``: at a length that all can train, and at one that ``keep`` cannot. Then come the
limits, by bisection (sequences of batch 1, batches of sequences of ``--short`` tokens), and whether ``auto`` trains 4
times the limit of ``keep`` and 1.5 times that of ``checkpoint``; ``--limits`` also looks for its own limit. The exit
code says whether all was answered well. An hour on two cores, most of it long sequences; some GB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gemini.sizes import parse_bytes

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ("keep", "checkpoint", "auto")
OF_KEEP, OF_CHECKPOINT = 4.0, 1.5
CLOSE_ENOUGH = 1.1
"""A limit is known when something that is so much larger does not train."""
TRIAL_SECONDS = 3600
LIMITS = ("keep", "checkpoint", "auto, at least", "auto")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--cap", default="1.5GiB")
    parser.add_argument("--host-memory", help="as GeminiPlugin's (found out)")
    parser.add_argument("--short", type=int, default=128, help="tokens of the sequences in batches")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to use")
    parser.add_argument("--only", choices=("sequence", "batch"))
    parser.add_argument("--limits", action="store_true", help="of auto, too")


def run(options: argparse.Namespace) -> dict[str, Any]:
    asked = {name: getattr(options, name) for name in ("layers", "hidden", "steps", "folder", "host_memory")}
    asked["cap"] = parse_bytes(options.cap)
    kinds = {
        "sequence": lambda length: {**asked, "batch_size": 1, "seq_len": length},
        "batch": lambda size: {**asked, "batch_size": size, "seq_len": options.short},
    }
    units = {"sequence": 64, "batch": 1}
    found: dict[str, Any] = {**asked}
    answers: list[bool] = []
    for kind, trial in kinds.items():
        if options.only in (None, kind):
            found[kind] = compare(kind, trial, units[kind], options.limits, answers)
    table = [
        {"longest, by policy": kind, **{name: str(found[kind][name]) for name in LIMITS if name in found[kind]}}
        for kind in kinds
        if kind in found
    ]
    return {"table": table, "ok": all(answers), **found}


def compare(
    kind: str, trial: Callable[[int], dict[str, Any]], unit: int, limits: bool, answers: list[bool]
) -> dict[str, Any]:
    """The limits of one kind of size, as multiples of ``unit``."""

    def check(what: str, holds: bool) -> None:
        answers.append(holds)
        print(f"{'ok  ' if holds else 'FAIL'}  {kind}: {what}", flush=True)

    def losses(policy: str, size: int) -> Any:
        result = trained({**trial(size), "policy": policy})
        print(f"      {policy} {size}: {result.get('error') or result}", flush=True)
        return result.get("losses")

    same = {policy: losses(policy, unit) for policy in POLICIES}
    check(
        f"losses at {unit} are {same['keep']} for all",
        None not in same.values() and len({*map(str, same.values())}) == 1,
    )
    found = {"keep": limit(partial(losses, "keep"), unit)}
    found["checkpoint"] = limit(partial(losses, "checkpoint"), unit, found["keep"])
    beyond = 2 * found["keep"]
    large = {policy: losses(policy, beyond) for policy in POLICIES[1:]}
    check(
        f"losses at {beyond}, beyond keep, are {large}",
        large["auto"] is not None and large["auto"] == large["checkpoint"],
    )
    wanted = max(round(OF_KEEP * found["keep"]), round(OF_CHECKPOINT * found["checkpoint"]))
    wanted = -(-wanted // unit) * unit
    found["auto, at least"] = wanted if losses("auto", wanted) is not None else 0
    ratios = f"{wanted / found['keep']:.1f} of keep's limit {found['keep']}, {wanted / found['checkpoint']:.2f} of "
    check(f"auto trains {wanted}: {ratios}checkpoint's {found['checkpoint']}", bool(found["auto, at least"]))
    if limits:
        found["auto"] = limit(partial(losses, "auto"), unit, wanted)
        print(f"      {kind}: auto's limit is {found['auto']}", flush=True)
    return found


def limit(losses: Callable[[int], Any], unit: int, start: int = 0) -> int:
    """The largest multiple of ``unit`` that trains, to a tenth of it; 0 if none does."""
    low, high = 0, max(start, unit)
    while losses(high) is not None:
        low, high = high, 2 * high
    while high - low > unit and high > CLOSE_ENOUGH * low:
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if losses(middle) is not None else (low, middle)
    return low


def trained(asked: dict[str, Any]) -> dict[str, Any]:
    """What the child printed last; ``error`` if it did not get there."""
    command = [sys.executable, __file__, json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        with tempfile.TemporaryDirectory() as state:  # the cap alone counts, not what others on this machine lease
            environment["XDG_STATE_HOME"] = state
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TRIAL_SECONDS} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}


def child(asked: dict[str, Any]) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (asked["cap"],) * 2)
    import torch
    from torch.utils.checkpoint import checkpoint

    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam
    from gemini.train.model import GPT2LMHeadModel, GPTConfig

    hidden, length = asked["hidden"], asked["seq_len"]
    torch.manual_seed(0)
    with LazyInitContext():
        model: Any = GPT2LMHeadModel(
            GPTConfig(layers=asked["layers"], hidden=hidden, heads=hidden // 64, seq_len=max(length, 1024))
        )
    if asked["policy"] == "checkpoint":
        for block in model.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-4)
    policy = "auto" if asked["policy"] == "auto" else "keep"
    generator = torch.Generator().manual_seed(1)
    losses = []
    with tempfile.TemporaryDirectory(dir=asked["folder"]) as folder:
        plugin = GeminiPlugin(
            offload_dir=folder, activation_policy=policy, host_memory=asked["host_memory"], telemetry=False
        )
        booster = Booster(plugin=plugin)
        model, optimizer, *_ = booster.boost(model, optimizer)
        for _ in range(asked["steps"]):
            batch = torch.randint(0, 256, (asked["batch_size"], length), generator=generator)
            loss = model(batch, batch)
            booster.backward(loss, optimizer)
            losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        stats = model.memory_stats()
    print(
        json.dumps(
            {
                "losses": losses,
                "seconds": round(stats["step/seconds"], 1),
                "moved_mib": stats["activation/leave_bytes"] >> 20,
                "host_capacity_mib": stats["host/capacity_bytes"] >> 20,
            }
        )
    )


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
