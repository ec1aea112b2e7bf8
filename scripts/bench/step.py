"""One training step, managed against plain PyTorch, interleaved in one process: ratios, not absolutes.

Each row is the median over the steps of (seconds of that row) / (seconds of plain PyTorch in the same round). Plain is
PyTorch with ``torch.optim.AdamW(fused=True)``; the managed runs train the same model on the same batch.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import report
import torch
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig


def plain(model: nn.Module, batch: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def managed(model: nn.Module, batch: Any, **plugin: Any) -> tuple[Callable[[], None], nn.Module]:
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-4))

    def step() -> None:
        booster.backward(model(*batch), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step, model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)


def run(options: argparse.Namespace) -> dict[str, object]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPTConfig(layers=options.layers, hidden=options.hidden, heads=options.hidden // 64, seq_len=options.seq_len)
        )

    tokens = torch.randint(0, 256, (options.batch_size, options.seq_len))
    batch = (tokens, tokens)
    parameters = sum(p.numel() for p in build().parameters())
    with tempfile.TemporaryDirectory() as folder:
        half = parameters * 16 // 2
        rows: dict[str, tuple[Callable[[], None], nn.Module | None]] = {
            "plain fp32": (plain(build(), batch), None),
            "managed fp32, all in RAM": managed(build(), batch, precision="fp32"),
            "managed fp32, emulated device of 1/4 of the parameters": managed(
                build(), batch, precision="fp32", device_memory=parameters
            ),
            "managed fp32, half of the model data on disk": managed(
                build(), batch, precision="fp32", host_memory=half, offload_dir=folder
            ),
            "plain bf16 (no masters)": (plain(build().to(torch.bfloat16), batch), None),
            "managed bf16, all in RAM": managed(build(), batch),
            "managed bf16, half of the model data on disk": managed(
                build(), batch, host_memory=parameters * 14 // 2, offload_dir=folder
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for round_ in range(options.steps + 3):
            for name, (step, _) in rows.items():
                begin = time.perf_counter()
                step()
                if round_ >= 3:  # compile, warm-up cycle, first planned cycle
                    seconds[name].append(time.perf_counter() - begin)
        shape = f"batch {options.batch_size} x {options.seq_len}"
        print(f"{parameters / 1e6:.1f}M parameters, {shape}, {torch.get_num_threads()} threads")
        results: dict[str, dict[str, float]] = {}
        table: list[dict[str, str]] = []
        for name, (_, model) in rows.items():
            base = seconds["plain bf16 (no masters)" if "bf16" in name else "plain fp32"]
            ratio = statistics.median(s / b for s, b in zip(seconds[name], base, strict=True))
            results[name] = {"seconds": statistics.median(seconds[name]), "ratio_to_plain": ratio}
            row = {"run": name, "ms a step": f"{1e3 * results[name]['seconds']:.1f}", "to plain": f"{ratio:.2f}"}
            row |= {"prefetched": report.UNKNOWN, "waited ms": report.UNKNOWN}
            if model is not None:
                stats = model.memory_stats()
                waited = stats["move/stall_seconds"] / (options.steps + 3)
                row |= {"prefetched": f"{stats['move/prefetch_hit_ratio']:.0%}", "waited ms": f"{1e3 * waited:.0f}"}
            table.append(row)
    return {"table": table, "parameters": parameters, "rows": results}
