"""What telemetry costs the training thread, side by side in one process: the same model with and without it.

    python scripts/bench telemetry [--rounds 200]

Three numbers. The time inside the hook that runs after each step, on the training thread (median, mean and 99th
percentile). The processor time of the telemetry thread, all of which training would lose if no core were free and the
interpreter's lock were always wanted: mean of the hook and this, together, bound what a step loses. And the ratio of
whole steps. Both models take turns, in an order that alternates, on the same batch.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig

SETTLING = 5
"""Steps before the measured ones: compilation, the warm-up cycle, the first planned cycles."""


class Row:
    """One managed model and the time that its steps and their hooks took."""

    def __init__(self, telemetry: bool | Path, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = GPTConfig(layers=options.layers, hidden=options.hidden, heads=options.hidden // 64, seq_len=128)
        model: Any = GPT2LMHeadModel(config)
        self.booster = Booster(plugin=GeminiPlugin(telemetry=telemetry, precision="fp32"))
        self.model, self.optimizer, *_ = self.booster.boost(model, HybridAdam(model.parameters(), lr=1e-4))
        self.hook_seconds: list[float] = []
        self.step_seconds: list[float] = []
        engine = boosted(self.model).engine
        engine.step_ended = self._timed(engine.step_ended)  # type: ignore[method-assign]

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            begin = time.perf_counter()
            hook(*args)
            self.hook_seconds.append(time.perf_counter() - begin)

        return timed

    def step(self, tokens: torch.Tensor) -> None:
        begin = time.perf_counter()
        self.booster.backward(self.model(tokens, tokens), self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_seconds.append(time.perf_counter() - begin)


def telemetry_thread_seconds() -> float:
    """Processor time that the telemetry thread of this process has used."""
    (thread,) = (t for t in threading.enumerate() if t.name == "gemini-memory-telemetry")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)


def run(options: argparse.Namespace) -> dict[str, Any]:
    tokens = torch.randint(0, 256, (options.batch_size, 128))
    with tempfile.TemporaryDirectory() as folder:
        rows = {"without": Row(False, options), "with telemetry": Row(Path(folder), options)}
        for round_ in range(options.rounds + SETTLING):
            if round_ == SETTLING:
                begin, thread_begin = time.perf_counter(), telemetry_thread_seconds()
            for row in list(rows.values())[:: 1 if round_ % 2 else -1]:
                row.step(tokens)
        elapsed, thread_seconds = time.perf_counter() - begin, telemetry_thread_seconds() - thread_begin
        for row in rows.values():
            del row.hook_seconds[:SETTLING], row.step_seconds[:SETTLING]
        writer = boosted(rows["with telemetry"].model).telemetry
        assert writer is not None
        print(f"{options.rounds} steps each, {torch.get_num_threads()} threads")
        table = []
        for name, row in rows.items():
            hook = sorted(row.hook_seconds)
            median, p99 = (1e6 * hook[len(hook) * percent // 100] for percent in (50, 99))
            step, mean = 1e3 * statistics.median(row.step_seconds), 1e6 * statistics.fmean(hook)
            table.append(
                {
                    "run": name,
                    "ms a step": f"{step:.2f}",
                    "hook after it, median us": f"{median:.1f}",
                    "mean": f"{mean:.1f}",
                    "p99": f"{p99:.1f}",
                }
            )
        without, with_ = rows["without"], rows["with telemetry"]
        added = statistics.median(with_.hook_seconds) - statistics.median(without.hook_seconds)
        mean_added = statistics.fmean(with_.hook_seconds) - statistics.fmean(without.hook_seconds)
        share = mean_added / 0.05 + thread_seconds / elapsed
        print(f"the telemetry thread computes for {thread_seconds / elapsed:.3%} of the time")
        print(f"together at most, of a 50 ms step: {share:.3%}")
        pairs = zip(with_.step_seconds, without.step_seconds, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"added to the training thread: {1e6 * added:.1f} us a step at the median ({added / 0.05:.3%} of 50 ms)")
        print(f"whole steps, median of with/without in the same round: {ratio:.4f}")
        writer.close()
    return {"table": table, "added_seconds": added, "share_of_50_ms": share, "step_ratio": ratio}
