"""Lazy against eager initialisation of a Llama, side by side in one process: ratios, not absolutes.

    python scripts/bench lazy [--model 1.3b | 160m] [--rounds 3]

Eager is: build the model, then copy every parameter into fp32 chunks. Lazy is: build it in a LazyInitContext, then
replay it straight into such chunks. Both write into memory that was touched before, so that what is compared is the
initialisation. Before that, while no freed memory is around that could be used again, one lazy boost with all of the
plugin's work (no optimizer, bf16 chunks), and the peak of the resident set over what the chunks take.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext, materialize

SIZES = {
    "160m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
}


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


class Flat:
    """Chunks: fp32 memory that parameters are copied into one after the other."""

    def __init__(self, numel: int) -> None:
        self.memory = torch.zeros(numel)
        self.used = 0

    def __call__(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        room = self.memory[self.used : self.used + value.numel()].view(value.shape)
        self.used += value.numel()
        return room.copy_(value)


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(SIZES), default="1.3b")
    parser.add_argument("--rounds", type=int, default=3)


def run(options: argparse.Namespace) -> dict[str, Any]:
    transformers.logging.set_verbosity_error()

    def build(**sizes: int) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=32000, **(sizes or SIZES[options.model]))
        return transformers.LlamaForCausalLM(config)

    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    build(**tiny)
    with LazyInitContext():
        warm = build(**tiny)
        for _ in range(5):  # enough to load the compiled code before the clock runs
            torch.empty(1 << 20).normal_()
    materialize(warm)

    with LazyInitContext():
        sizes = [p.numel() for p in build().parameters()]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    with LazyInitContext():
        boosted = build()
    start = time.perf_counter()
    plugin = GeminiPlugin(telemetry=False)
    model, *_ = Booster(plugin=plugin).boost(boosted)
    seconds = time.perf_counter() - start
    growth, chunks = status("VmHWM:") - before, model.memory_stats()["host/used_bytes"]
    print(
        f"lazy boost {seconds:.2f} s; the resident set grew by {growth / 2**20:.0f} MiB at its peak: chunks "
        f"{chunks / 2**20:.0f} MiB, {(growth - chunks) / 2**20:.0f} MiB over them; the largest parameter is "
        f"{max(sizes) * 4 / 2**20:.0f} MiB"
    )
    del model, boosted
    gc.collect()

    flat = Flat(sum(sizes))
    print(f"{flat.memory.numel() / 1e6:.0f} M parameters, {torch.get_num_threads()} threads")
    ratios, rounds = [], []
    for _ in range(options.rounds):
        flat.used = 0
        eager_seconds = timed(lambda: [flat(parameter, parameter.data) for parameter in build().parameters()])
        flat.used = 0
        start = time.perf_counter()
        with LazyInitContext():
            model = build()
        recorded = time.perf_counter()
        materialize(model, flat)
        done = time.perf_counter()
        ratios.append((done - start) / eager_seconds)
        rounds.append({"eager": eager_seconds, "lazy, context": recorded - start, "lazy, into chunks": done - recorded})
        del model
    medians = {name: f"{statistics.median(each[name] for each in rounds):.2f}" for name in rounds[0]}
    table = [{"model": options.model, **medians, "lazy / eager": f"{statistics.median(ratios):.2f}"}]
    boost = {"seconds": seconds, "growth_bytes": growth, "chunks_bytes": chunks, "largest_bytes": 4 * max(sizes)}
    return {"table": table, "ratios": ratios, "seconds": rounds, "boost": boost}
