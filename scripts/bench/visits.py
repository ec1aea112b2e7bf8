"""What a visit of a unit costs when chunks stream, beside the moves themselves.

    python scripts/bench visits [--layers 12 --hidden 64 --seq-len 64]

A GPT whose full copies stay on DEVICE, and the same one with room for a few chunks, in turns. A training step calls
every layer once, and backward comes to it once: that is a visit. What a streaming step takes more, less the seconds
that the training thread spends on bringing chunks and on taking them away, is what the visits cost. CPU time of the
training thread, so that other programs matter less; one thread. The Python functions that a visit calls are counted in
the same way: their number does not depend on the load.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig


class Contender:
    """A training of the model; ``moves`` has the seconds of the training thread in moves."""

    def __init__(self, config: GPTConfig, **plugin: Any) -> None:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        self._tokens = torch.randint(0, 256, (1, config.seq_len))
        self._booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
        self.model, self._optimizer, *_ = self._booster.boost(model, HybridAdam(model.parameters(), lr=1e-4))
        self.moves = 0.0
        self.enters = 0
        manager = boosted(self.model).manager
        self._is_moving = False
        for owner, name in ((manager, "fetch"), (manager, "evict"), (manager.full_copies, "arrive")):
            setattr(owner, name, self._timed(getattr(owner, name)))
        engine = boosted(self.model).engine
        engine.enter = self._counted(engine.enter)  # type: ignore[method-assign]

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_moving:
                return call(*args, **kwargs)
            self._is_moving, begin = True, time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self._is_moving, self.moves = False, self.moves + time.thread_time() - begin

        return timed

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.enters += 1
            return call(*args, **kwargs)

        return counted

    def run(self, steps: int) -> tuple[float, float, float]:
        """Seconds of a step, those in moves, and visits."""
        self.moves, self.enters, begin = 0.0, 0, time.thread_time()
        for _ in range(steps):
            loss = self.model(self._tokens, self._tokens)
            self._booster.backward(loss, self._optimizer)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return (time.thread_time() - begin) / steps, self.moves / steps, self.enters / 2 / steps

    def count_calls(self, steps: int) -> float:
        """Python functions of ours and of torch's that a step calls, but for those in moves.

        Without the looks at the lease, which come twice a second.
        """
        count = 0

        def look(frame: FrameType, event: str, _: Any) -> None:
            nonlocal count
            file = frame.f_code.co_filename
            is_counted = event == "call" and ("/gemini/" in file or "/torch/" in file) and "/lease/" not in file
            count += is_counted and not self._is_moving

        sys.setprofile(look)
        try:
            self.run(steps)
        finally:
            sys.setprofile(None)
        return count / steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="in a turn")
    parser.add_argument("--turns", type=int, default=15)


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = GPTConfig(
        layers=options.layers, hidden=options.hidden, heads=max(1, options.hidden // 64), seq_len=options.seq_len
    )
    numel = 4 * options.hidden**2 + 256
    chunks: dict[str, Any] = {"chunk_config_dict": {1: {"chunk_size": numel}}, "precision": "bf16"}
    streaming = Contender(config, device_memory=2 * numel * 12, **chunks)
    resident = Contender(config, **chunks)
    for contender in (streaming, resident):
        contender.run(5)  # the warm-up, and plans
    costs, ratios = [], []
    for _ in range(options.turns):
        seconds, moves, visits = streaming.run(options.steps)
        base, base_moves, _ = resident.run(options.steps)
        costs.append(1e6 * (seconds - moves - (base - base_moves)) / visits)
        ratios.append(seconds / base)
    calls = (streaming.count_calls(options.steps) - resident.count_calls(options.steps)) / visits
    fetches = streaming.model.memory_stats()["move/fetch_count"] / ((options.turns + 1) * options.steps + 5)
    print(f"{visits:.0f} visits and {fetches:.0f} fetches a step")
    low, middle, high = statistics.quantiles(costs, n=4)
    table = [
        {
            "us a visit, beside the moves (40)": f"{middle:.1f}",
            "quartiles": f"{low:.1f} to {high:.1f}",
            "functions called": f"{calls:.1f}",
            "streaming / resident, CPU time": f"{statistics.median(ratios):.3f}",
        }
    ]
    return {"table": table, "microseconds": costs, "ratios": ratios}
