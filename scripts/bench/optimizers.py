"""One step of torch's element-wise optimizers: their own, on a whole tensor, against the same arithmetic on chunks.

In fp32, where both start from an fp32 gradient, and as mixed precision has it: from a bf16 gradient to a bf16 copy of
the parameters, with the casts that plain torch needs around its step. Ours runs as it does in training, on a background
thread that keeps torch's operations to itself and shares the pieces with the other threads of the pool.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import report
import torch
from torch import Tensor, nn

from gemini.nn.optimizer.acceptance import accepted
from gemini.nn.optimizer.kernels import kernel_pool
from gemini.process_wide import PerProcess, compute_on_this_thread, keep_freed_memory

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD, weight decay": (torch.optim.SGD, {"weight_decay": 0.1}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD, Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop, centered, momentum": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Rprop": (torch.optim.Rprop, {}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numel", type=int, default=1 << 25)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", help="1 and all cores by default")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    keep_freed_memory()  # as training is where RAM is not short; for both
    cores = sorted(os.sched_getaffinity(0))
    results: list[dict[str, Any]] = []
    for threads in arguments.threads or sorted({1, len(cores)}):
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores[:threads])
        kernel_pool._of_process = PerProcess(partial(kernel_pool.KernelPool, threads))
        with ThreadPoolExecutor(1) as background:
            background.submit(compute_on_this_thread, torch.get_num_threads, torch.set_num_threads).result()
            rows = {name: _measure(name, arguments, background) for name in OPTIMIZERS}
        results.append({"threads": threads, "rows": rows})
        os.sched_setaffinity(0, cores)
    table = [
        {"ms a step": name, "threads": str(found["threads"]), **{key: f"{value:.2f}" for key, value in row.items()}}
        for found in results
        for name, row in found["rows"].items()
    ]
    return {"table": table, "numel": arguments.numel, "repeats": arguments.repeats, "runs": results}


def _measure(name: str, arguments: argparse.Namespace, background: ThreadPoolExecutor) -> dict[str, float]:
    cls, options = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(arguments.numel, generator=generator)
    gradient = torch.randn(arguments.numel, generator=generator)
    low = gradient.bfloat16()
    theirs = nn.Parameter(value.clone())
    plain = cls([theirs], lr=1e-4, **options)
    managed = accepted(cls([nn.Parameter(value[:1].clone())], lr=1e-4, **options))
    group = managed.param_groups[0]
    slots = managed.rule.slots(group)
    states = [torch.zeros_like(value) for _ in slots]
    outs = [torch.empty_like(low) for _ in range(2)]

    def torch_fp32() -> None:
        theirs.grad = gradient
        plain.step()

    def torch_bf16() -> None:
        theirs.grad = low.float()
        plain.step()
        outs[0].copy_(theirs.detach())

    def ours(grad: Tensor, out: Tensor | None) -> Callable[[], None]:
        at_step = managed.rule.bind(group, slots)(2, 1.0)
        return lambda: background.submit(at_step.apply, value, states, grad, out).result()

    actions = {
        "torch fp32": torch_fp32, "ours fp32": ours(gradient, None),
        "torch bf16": torch_bf16, "ours bf16": ours(low, outs[1]),
    }  # fmt: skip
    for action in actions.values():
        action()
    seconds = report.take_turns({key: report.timed(action) for key, action in actions.items()}, arguments.repeats)
    row = {key: statistics.median(values) * 1e3 for key, values in seconds.items()}
    row |= {f"ratio {kind}": report.ratio(seconds, f"ours {kind}", f"torch {kind}") for kind in ("fp32", "bf16")}
    return row
