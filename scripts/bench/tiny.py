"""A step of the unmanaged ``HybridAdam`` over many tensors of one size, against torch's fused AdamW, by turns.

With small tensors it is Python that takes the time, not the arithmetic.
"""

import argparse
import statistics
from collections.abc import Callable

import report
import torch
from torch import nn

from gemini.nn.optimizer import HybridAdam

OPTIONS = {"lr": 1e-3, "weight_decay": 0.01}
OURS, FUSED = "ours", "torch fused"
WANTED_AT = 64
"""Elements at which ours is to be as fast as torch's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numels", type=int, nargs="+", default=[16, 64, 1024, 16384], help="elements of a tensor")
    parser.add_argument("--count", type=int, default=1000, help="tensors")
    parser.add_argument("--repeats", type=int, default=20)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    print(f"{arguments.count} tensors, {torch.get_num_threads()} threads, microseconds a tensor")
    rows = [_row(numel, arguments.count, arguments.repeats) for numel in arguments.numels]
    table = [
        {
            "elements": f"{row['numel']}",
            OURS: f"{row['ours_us']:.2f}",
            FUSED: f"{row['fused_us']:.2f}",
            "ours / torch": f"{row['ratio']:.2f}",
            "wanted": "1 or less" if row["numel"] == WANTED_AT else report.UNKNOWN,
        }
        for row in rows
    ]
    return {"table": table, "rows": rows}


def _row(numel: int, count: int, repeats: int) -> dict[str, float]:
    steps = {OURS: _stepping(HybridAdam, numel, count), FUSED: _stepping(torch.optim.AdamW, numel, count, fused=True)}
    actions = {name: report.timed(step) for name, step in steps.items()}
    for action in actions.values():
        action()  # compiles, makes states
    seconds = report.take_turns(actions, repeats)
    ours, fused = (statistics.median(seconds[name]) * 1e6 / count for name in (OURS, FUSED))
    ratio = report.ratio(seconds, OURS, FUSED)
    return {"numel": numel, "ours_us": ours, "fused_us": fused, "ratio": ratio}


def _stepping(kind: type[torch.optim.Optimizer], numel: int, count: int, **options: bool) -> Callable[[], object]:
    params = [nn.Parameter(torch.randn(numel)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(numel)
    return kind(params, **OPTIONS, **options).step  # type: ignore[arg-type]
