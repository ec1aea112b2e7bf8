"""Are the moves hidden? Everything but the ring on disk, and enough computing to hide behind.

    python scripts/bench overlap [--tokens 2048 --layers 8 --hidden 768 --folder FOLDER]

After the warm-up: the share of fetches that had been started before they were needed, and the share of the step that
units waited for chunks (for a fetch, or for the update before it). Beside them what a step moves and how long computing
alone takes (the same model with all in RAM), for the condition: computing per moment must be longer than its moves.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig

WARM_UP_STEPS = 2


def train(config: GPTConfig, tokens: torch.Tensor, steps: int, **plugin: Any) -> dict[str, float]:
    """Per step, after the warm-up."""
    torch.manual_seed(0)
    with LazyInitContext():
        model: Any = GPT2LMHeadModel(config)
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-4)
    model, optimizer, *_ = booster.boost(model, optimizer)
    before, begin = {}, 0.0
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            before, begin = model.memory_stats(), time.perf_counter()
        booster.backward(model(tokens, tokens), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    seconds, after = time.perf_counter() - begin, model.memory_stats()

    def per_step(key: str) -> float:
        return float(after[key] - before[key]) / steps

    used = (after["move/prefetch_hit_ratio"] * after["move/fetch_count"]) - (
        before["move/prefetch_hit_ratio"] * before["move/fetch_count"]
    )
    return {
        "seconds": seconds / steps,
        "stall_seconds": per_step("move/stall_seconds"),
        "fetches": per_step("move/fetch_count"),
        "hits": used / steps,
        "read_bytes": per_step("move/disk_read_bytes"),
        "written_bytes": per_step("move/disk_write_bytes"),
        "disk_bytes": float(after["disk/used_bytes"]),
        "host_bytes": float(after["host/used_bytes"]),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048, help="in a batch")
    parser.add_argument("--steps", type=int, default=3, help="after the warm-up")
    parser.add_argument("--host-memory", default="120MiB")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to use")


def run(options: argparse.Namespace) -> dict[str, Any]:
    config = GPTConfig(
        layers=options.layers, hidden=options.hidden, heads=options.hidden // 64, seq_len=options.seq_len
    )
    tokens = torch.randint(0, 256, (options.tokens // options.seq_len, options.seq_len))
    resident = train(config, tokens, options.steps)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        streamed = train(config, tokens, options.steps, host_memory=options.host_memory, offload_dir=folder)
    if not streamed["fetches"]:
        raise SystemExit(f"nothing moves: with --host-memory {options.host_memory} the model fits")
    moved = streamed["read_bytes"] + streamed["written_bytes"]
    print(
        f"{config.parameter_count() / 1e6:.0f}M parameters, {options.tokens} tokens, {torch.get_num_threads()} "
        f"threads, {streamed['disk_bytes'] / 1e9:.2f} GB on disk, {streamed['host_bytes'] / 1e6:.0f} MB in RAM"
    )
    seconds, fetches = streamed["seconds"], streamed["fetches"]
    table = [
        {
            "s a step, in RAM": f"{resident['seconds']:.2f}",
            "streamed": f"{seconds:.2f}",
            "GB moved": f"{moved / 1e9:.2f}",
            "GB/s": f"{moved / seconds / 1e9:.2f}",
            "fetches": f"{fetches:.1f}",
            "prefetched (0.99)": f"{streamed['hits'] / fetches:.4f}",
            "waited (0.02)": f"{streamed['stall_seconds'] / seconds:.4f}",
        }
    ]
    return {"table": table, "parameters": config.parameter_count(), "in RAM": resident, "streamed": streamed}
