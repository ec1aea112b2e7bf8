"""Time per parameter of one Adam step on this machine's CPU, all candidates in one run.

    python scripts/bench/adam.py [--numel 33554432] [--threads N] [--repeats 15]

The candidates take turns, so that a machine shared with others slows all of them alike; the table has the median and
the best. Bytes are what the candidate must read and write at least, so GB/s compares with ``copy``.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gemini.nn.optimizer.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.kernel_pool import available_threads
from gemini.nn.optimizer.reference import adam_reference
from gemini.nn.optimizer.update import adam_update

HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True, bias_correction=True)


def torch_adamw(param: Tensor, grad: Tensor, **options: bool) -> Callable[[], None]:
    parameter = torch.nn.Parameter(param)
    parameter.grad = grad
    optimizer = torch.optim.AdamW([parameter], **options)
    optimizer.step()  # makes the states
    return lambda: optimizer.step()


def candidates(numel: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> bytes moved per parameter, action. Buffers are shared where that keeps the memory small."""
    param, exp_avg, exp_avg_sq, grad = torch.randn(numel), torch.zeros(numel), torch.zeros(numel), torch.randn(numel)
    grad16, out16 = grad.bfloat16(), torch.empty(numel, dtype=torch.bfloat16)
    step = scalars(HYPER, 10)
    fused = torch_adamw(param.clone(), grad, fused=True)
    cast_param = param.clone()
    cast_grad = torch.empty(numel)
    cast_fused = torch_adamw(cast_param, cast_grad, fused=True)

    def fused_with_casts() -> None:
        cast_grad.copy_(grad16)
        cast_fused()
        out16.copy_(cast_param)

    copy_from, copy_to = torch.zeros(numel * 7, dtype=torch.int16), torch.zeros(numel * 7, dtype=torch.int16)
    return {
        "ours, bf16 grad, bf16 out": (28, lambda: adam_update(param, exp_avg, exp_avg_sq, grad16, step, out16)),
        "ours, fp32": (28, lambda: adam_update(param, exp_avg, exp_avg_sq, grad, step)),
        "torch fused, fp32": (28, fused),
        "torch fused + two casts, bf16": (28, fused_with_casts),
        "torch foreach, fp32": (28, torch_adamw(param.clone(), grad, foreach=True)),
        "our reference, bf16": (28, lambda: adam_reference(param, exp_avg, exp_avg_sq, grad16, step, out16)),
        "copy of the same bytes": (28, lambda: copy_to.copy_(copy_from)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 25)
    parser.add_argument("--threads", type=int, default=available_threads(), help="of torch and of our kernel")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cores)  # what our pool takes its size from

    actions = candidates(arguments.numel)
    for _, action in actions.values():
        action()  # compiles, touches memory
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(arguments.repeats):
        for name, (_, action) in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)

    print(
        f"{arguments.numel} parameters, {len(cores)} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    print(f"{'':32}{'ns/parameter':>14}{'best':>8}{'ms':>9}{'GB/s':>8}")
    for name, (nbytes, _) in actions.items():
        median, best = statistics.median(seconds[name]), min(seconds[name])
        per = 1e9 / arguments.numel
        rate = nbytes * arguments.numel / median / 1e9
        print(f"{name:32}{median * per:14.2f}{best * per:8.2f}{median * 1e3:9.1f}{rate:8.1f}")


if __name__ == "__main__":
    main()
