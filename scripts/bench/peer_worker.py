"""Runs in the peers' environment: builds their kernels, then one repetition for each name on stdin.

Answers are JSON lines on the real stdout; what the peers print goes to stderr. Imports nothing of ours.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from buffers import Buffers

Action = Callable[[], object]


def deepspeed(folder: Path, b: Buffers) -> dict[str, Action]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(b.param)
    optimizer = DeepSpeedCPUAdam([parameter], lr=1e-3, weight_decay=0.01)
    optimizer.state[parameter] = {"step": 9, "exp_avg": b.exp_avg, "exp_avg_sq": b.exp_avg_sq}

    def bare() -> None:
        parameter.grad = b.grad
        optimizer.step()

    def whole() -> None:
        parameter.grad = b.grad16.float()
        optimizer.step()
        b.out16.copy_(parameter.data)
        parameter.grad = None

    return {"DeepSpeedCPUAdam, bare, ready fp32 gradient": bare, "DeepSpeedCPUAdam + ZeRO-Offload's casts": whole}


def colossal(folder: Path, b: Buffers) -> dict[str, Action]:
    from torch.utils.cpp_extension import load

    (source,) = (folder / "src").glob("colossalai-*/extensions/csrc/kernel/x86/cpu_adam.cpp")
    # Their build asks for CUDA. The kernel uses of its headers the name of a half alone, and not for fp32.
    stubs = folder / "no-cuda"
    stubs.mkdir(exist_ok=True)
    for name in ("cublas_v2.h", "cuda.h", "cuda_fp16.h", "cuda_runtime_api.h"):
        if not (stubs / name).exists():  # a newer file would have everything built again
            (stubs / name).write_text("#pragma once\n" + ("typedef _Float16 __half;\n" if "fp16" in name else ""))
    flags = ["-O3", "-std=c++20", "-g", "-Wno-reorder", "-fopenmp", "-march=native"]  # theirs; torch asks for C++20
    module: Any = load("colossal_cpu_adam", [str(source)], extra_cflags=flags, extra_include_paths=[str(stubs)])
    kernel = module.CPUAdamOptimizer(1e-3, 0.9, 0.999, 1e-8, 0.01, True)
    step = [9]

    def update(grad: torch.Tensor) -> None:
        step[0] += 1
        kernel.step(step[0], 1e-3, 0.9, 0.999, 1e-8, 0.01, True, b.param, grad, b.exp_avg, b.exp_avg_sq, -1.0)

    def whole() -> None:
        update(b.grad16.float())
        b.out16.copy_(b.param)

    return {
        "ColossalAI's kernel, bare, ready fp32 gradient": lambda: update(b.grad),
        "ColossalAI's kernel + the same casts": whole,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers and DeepSpeed print
    folder = Path(sys.argv[1])
    buffers = Buffers(int(sys.argv[2]), int(sys.argv[3]))
    actions: dict[str, Action] = {}
    errors = {f"installation {i}": text for i, text in enumerate(json.loads((folder / "installed.json").read_text()))}
    for name, build in (("DeepSpeed", deepspeed), ("ColossalAI", colossal)):
        try:
            for label, action in build(folder, buffers).items():
                action()
                actions[label] = action
        except Exception:
            errors[name] = traceback.format_exc()[-2000:]
    versions = {"torch": torch.__version__}
    for package in ("deepspeed",):
        try:
            versions[package] = version(package)
        except ImportError:
            continue
    versions |= {
        p.name.split("-")[0]: p.name.split("-")[1] for p in (folder / "src").glob("colossalai-*") if p.is_dir()
    }
    print(json.dumps({"names": list(actions), "errors": errors, "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        actions[line.strip()]()
        print(json.dumps({"seconds": time.perf_counter() - begin}), file=answers, flush=True)


if __name__ == "__main__":
    main()
