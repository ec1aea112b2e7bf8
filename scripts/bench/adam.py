"""Time per parameter of one Adam step on this machine's CPU, all candidates in one run.

The whole job of mixed precision is: read a bf16 gradient, update the fp32 master and both moments, write the bf16 copy
that the next forward uses. Ours does it in one pass; the others need a cast before and one after. "Casts" are made as a
training loop writes them (a new fp32 gradient each step), or into buffers that are kept (faster, 4 more bytes a
parameter).

Candidates take turns. The ratio is the median over the rounds of (this row) / (the row of ours that it is compared
with). Bytes are those that the candidate must read and write at least; GB/s compares them with a plain copy of memory.
Ours does the whole job in two ways: with whole masters (the default) and with masters in two halves, the upper one of
which is the copy (``GeminiPlugin(split_master=True)``): the same masters, moments and copy, in 26 bytes instead of 28.
The targets are printed for both.

Peers run in a process of their own, on the same memory; their packages are installed on the first run.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import buffers
import peers
import progress
import report
import torch
from buffers import Buffers
from torch import Tensor

from gemini.nn.optimizer.kernels import kernel_pool
from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.kernels.cpu_update import adam_cpu
from gemini.nn.optimizer.kernels.update import adam_update
from gemini.process_wide import PerProcess

HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True, bias_correction=True)
BLOCKS = (1 << 16, 1 << 18, 1 << 20)

OURS = "ours, bf16 gradient in, bf16 copy out"
OURS_SPLIT = "ours, bf16 gradient in, split master"
OURS_FP32 = "ours, fp32"
COPY = "copy of fp32 memory"
FUSED = "torch fused + casts as a loop writes them"
FUSED_KEPT = "torch fused + casts into kept buffers"
FUSED_FP32 = "torch fused, ready fp32 gradient"

# Bytes a parameter; of all others 28: bf16 gradient and copy, or an fp32 gradient, and 24 of states.
NBYTES = {COPY: 8, OURS_SPLIT: 26}

# (row, wanted ratio to the whole job in each of our ways): the targets of the project. A row is left out where it did
# not run.
TARGETS = (
    (FUSED, 2.5),
    ("the best of torch fused in blocks", 1.3),
    ("DeepSpeedCPUAdam + ZeRO-Offload's casts", 3.0),
    ("DeepSpeedCPUAdam, bare, ready fp32 gradient", 1.0),
    ("ColossalAI's kernel, bare, ready fp32 gradient", 1.0),
)
# Where a peer does not run: ns a parameter, 2 threads, measured earlier on a machine of the same kind.
EARLIER = {"DeepSpeed": "1.07 bare, 3.77 with casts", "ColossalAI": "18 to 34 (its bf16 path, eager torch)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numel", type=int, default=1 << 25, help="parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1 and all cores")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--peers", type=Path, default=peers.DEFAULT_FOLDER, help="environment of the peers")
    parser.add_argument("--no-peers", action="store_true", help="leave them out")


def candidates(b: Buffers) -> dict[str, Callable[[], object]]:
    at_step, moments = scalars(HYPER, 10), (b.exp_avg, b.exp_avg_sq)
    parameter, step = torch.nn.Parameter(b.param), torch.tensor(9.0)
    fused = _torch_adamw(parameter, b, step, fused=True)
    foreach = _torch_adamw(parameter, b, step, foreach=True)
    kept = torch.empty_like(b.grad)

    def with_gradient(gradient: Tensor, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = gradient
        optimizer.step()
        parameter.grad = None

    def as_a_loop(optimizer: torch.optim.Optimizer) -> None:
        with_gradient(b.grad16.float(), optimizer)
        b.out16.copy_(parameter.data)

    def into_kept() -> None:
        kept.copy_(b.grad16)
        with_gradient(kept, fused)
        b.out16.copy_(parameter.data)

    return {
        OURS: lambda: adam_update("fp32", (b.param, *moments), b.grad16, at_step, b.out16),
        OURS_SPLIT: lambda: adam_update("split", (b.out16, b.low16, *moments), b.grad16, at_step),
        OURS_FP32: lambda: adam_update("fp32", (b.param, *moments), b.grad, at_step),
        FUSED_FP32: lambda: with_gradient(b.grad, fused),
        FUSED: lambda: as_a_loop(fused),
        FUSED_KEPT: into_kept,
        **{f"torch fused in blocks of {size} + casts": _blocked(b, step, size) for size in BLOCKS},
        "torch foreach + casts as a loop writes them": lambda: as_a_loop(foreach),
        COPY: lambda: b.exp_avg.copy_(b.exp_avg_sq),
    }


def _torch_adamw(parameter: torch.nn.Parameter, b: Buffers, step: Tensor, **options: bool) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([parameter], lr=HYPER.lr, weight_decay=HYPER.weight_decay, **options)
    optimizer.state[parameter] = {"step": step, "exp_avg": b.exp_avg, "exp_avg_sq": b.exp_avg_sq}
    return optimizer


def _blocked(b: Buffers, step: Tensor, size: int) -> Callable[[], None]:
    """The kernel of torch's fused AdamW on pieces that stay in the cache between the casts and the update."""
    gradient = torch.empty(size)

    @torch.no_grad()
    def run() -> None:
        for start in range(0, b.param.numel(), size):
            p, m, v, g16, out = (t[start : start + size] for t in (b.param, b.exp_avg, b.exp_avg_sq, b.grad16, b.out16))
            g = gradient[: p.numel()].copy_(g16)
            torch._fused_adamw_(
                [p], [g], [m], [v], [], [step],
                lr=HYPER.lr, beta1=HYPER.beta1, beta2=HYPER.beta2, weight_decay=HYPER.weight_decay, eps=HYPER.eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            out.copy_(p)

    return run


def run(arguments: argparse.Namespace) -> dict[str, object]:
    cores = sorted(os.sched_getaffinity(0))
    python = None
    errors: dict[str, str] = {}
    memory = buffers.create(arguments.numel)
    Buffers(memory, arguments.numel).fill()
    if not arguments.no_peers:
        try:
            python = peers.install(arguments.peers)
        except peers.PeerError as error:
            errors["installation"] = str(error)
    results: list[dict[str, Any]] = []
    for threads in arguments.threads or sorted({1, len(cores)}):
        # Both kinds of threads: torch's, and our pool's, which takes its size from the cores of the process.
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores[:threads])
        kernel_pool._of_process = PerProcess(partial(kernel_pool.KernelPool, threads))
        with ExitStack() as stack:
            others = None
            if python is not None:
                try:
                    others = peers.Peers(python, arguments.peers, memory, arguments.numel, threads)
                    stack.callback(others.close)
                    errors |= others.errors
                except peers.PeerError as error:
                    errors["worker"] = str(error)
            results.append(
                _measure(arguments.numel, arguments.repeats, threads, Buffers(memory, arguments.numel), others)
            )
        os.sched_setaffinity(0, cores)
    for peer, error in errors.items():
        print(f"\n{peer} did not run:\n{error}\n  earlier figure, ns a parameter: {EARLIER.get(peer, 'none')}")
    kept = _main_thread(Buffers(memory, arguments.numel), len(cores)) if len(cores) > 1 else None
    os.close(memory)
    table = [
        {
            "one step of Adam": name,
            "threads": str(found["threads"]),
            "ns a parameter": f"{row['ns_per_parameter']:.2f}",
            "best": f"{row['best_ns_per_parameter']:.2f}",
            "GB/s": f"{row['gb_per_second']:.1f}",
            "to ours": f"{row['ratio_to_ours']:.2f}",
        }
        for found in results
        for name, row in found["rows"].items()
    ]
    return {
        "table": table,
        "numel": arguments.numel,
        "repeats": arguments.repeats,
        "runs": results,
        "main_thread": kept,
        "errors": errors,
    }


def _measure(numel: int, repeats: int, threads: int, b: Buffers, others: peers.Peers | None) -> dict[str, Any]:
    actions = {name: report.timed(action) for name, action in candidates(b).items()}
    if others is not None:
        actions |= {name: _of_peer(others, name) for name in others.names}
    for action in actions.values():
        action()  # compiles, touches memory
    seconds = report.take_turns(actions, repeats)
    blocked = min((n for n in seconds if "in blocks" in n), key=lambda n: statistics.median(seconds[n]))
    seconds["the best of torch fused in blocks"] = seconds[blocked]
    return {
        "threads": threads,
        "rows": _rows(numel, seconds),
        "targets": _print_targets(seconds),
        "versions": others.versions if others is not None else {},
    }


def _main_thread(b: Buffers, cores: int) -> float:
    """What a Python loop keeps of its rate beside an update on all cores but one."""
    at_step = scalars(HYPER, 10)
    kept = progress.kept_rate(
        lambda pool: adam_cpu("fp32", (b.param, b.exp_avg, b.exp_avg_sq), b.grad16, at_step, b.out16, pool), cores - 1
    )
    print(f"\n{'holds ' if kept >= 0.8 else 'MISSED'} {kept:6.2f}, wanted 0.8: rate of a Python loop beside an update")
    return kept


def _of_peer(others: peers.Peers, name: str) -> Callable[[], float]:
    return lambda: others.run(name)


def _rows(numel: int, seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    rows = {}
    for name, times in seconds.items():
        median, best, nbytes = statistics.median(times), min(times), NBYTES.get(name, 28)
        rows[name] = {
            "ns_per_parameter": median * 1e9 / numel,
            "best_ns_per_parameter": best * 1e9 / numel,
            "gb_per_second": nbytes * numel / median / 1e9,
            "ratio_to_ours": report.ratio(seconds, name, OURS),
        }
    return rows


def _print_targets(seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    targets: list[dict[str, object]] = []
    for ours in (OURS, OURS_SPLIT):
        for row, wanted in TARGETS:
            if row in seconds:
                targets.append({"what": f"{row} / {ours}", "ratio": report.ratio(seconds, row, ours), "wanted": wanted})
        share = NBYTES.get(ours, 28) / NBYTES[COPY] * report.ratio(seconds, COPY, ours)
        targets.append({"what": f"bytes per second / those of a copy, {ours}", "ratio": share, "wanted": 0.85})
    what = f"{FUSED_FP32} / {OURS_FP32}"
    targets.append({"what": what, "ratio": report.ratio(seconds, FUSED_FP32, OURS_FP32), "wanted": 1.0})
    for target in targets:
        holds = target["ratio"] >= target["wanted"]  # type: ignore[operator]
        print(f"{'holds ' if holds else 'MISSED'} {target['ratio']:6.2f}, wanted {target['wanted']}: {target['what']}")
    return targets
