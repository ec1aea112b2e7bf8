"""What management costs where everything fits: managed steps against unmanaged ones with the same optimizer.

    python scripts/bench overhead [--layers 16 --hidden 768 --seq-len 256]
    python scripts/bench overhead --split-master [--bytes-a-parameter 14.2]
    python scripts/bench overhead --activations

Both models in one process, in turns, a few steps at a time; a turn of a managed one ends when its last update does, so
that none of its work falls into the other's time. fp32, where both do the same arithmetic with the same kernel. The
ratio is the median over the pairs of turns; who begins alternates.

With ``--split-master`` both are managed, in bf16: one with masters in two halves, the other with whole ones. With so
many bytes of model data a parameter they need not both fit: whole masters take 14 and as much of 2 as there is. With
``--activations`` both are managed, in fp32, with a disk: one may move what is saved for backward, or compute it again
(``activation_policy="auto"``), the other keeps it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from tempfile import gettempdir
from typing import Any

import report
import torch

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig

Turn = Callable[[], list[float]]
"""Some steps; their losses."""


class Contenders:
    """Makes trainings of the same model on the same tokens."""

    def __init__(self, config: GPTConfig, batch_size: int, steps: int) -> None:
        self.config = config
        self.tokens = torch.randint(0, 256, (batch_size, config.seq_len))
        self.steps = steps

    def _build(self) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(self.config)
        return model, HybridAdam(model.parameters(), lr=1e-4)

    def unmanaged(self) -> Turn:
        model, optimizer = self._build()

        def turn() -> list[float]:
            losses = []
            for _ in range(self.steps):
                loss = model(self.tokens, self.tokens)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        return turn

    def managed(self, **plugin: Any) -> Turn:
        model, optimizer = self._build()
        booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
        model, optimizer, *_ = booster.boost(model, optimizer)

        def turn() -> list[float]:
            losses = []
            for _ in range(self.steps):
                loss = model(self.tokens, self.tokens)
                booster.backward(loss, optimizer)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            list(model.named_parameters())  # waits for the updates
            return losses

        return turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1, help="in a turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--split-master", action="store_true", help="compare split masters with whole ones")
    parser.add_argument("--bytes-a-parameter", type=float, help="host_memory of these two")
    parser.add_argument("--activations", action="store_true", help='compare the policies "auto" and "keep"')


def run(options: argparse.Namespace) -> dict[str, Any]:
    config = GPTConfig(
        layers=options.layers, hidden=options.hidden, heads=options.hidden // 64, seq_len=options.seq_len
    )
    contenders = Contenders(config, options.batch_size, options.steps)
    if options.split_master:
        room = options.bytes_a_parameter and round(options.bytes_a_parameter * config.parameter_count())
        turns = {
            "split": contenders.managed(split_master=True, host_memory=room),
            "whole": contenders.managed(host_memory=room),
        }
    elif options.activations:
        turns = {
            policy: contenders.managed(precision="fp32", offload_dir=gettempdir(), activation_policy=policy)
            for policy in ("auto", "keep")
        }
    else:
        turns = {"managed": contenders.managed(precision="fp32"), "unmanaged": contenders.unmanaged()}
    losses: dict[str, list[float]] = {name: [] for name in turns}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(options.turns + 1):
        for name in sorted(turns, reverse=bool(number % 2)):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            losses[name] += turns[name]()
            if number:  # the first compiles and warms up
                seconds[name].append((time.perf_counter() - begin) / options.steps)
                cpu_seconds[name].append((time.process_time() - cpu_begin) / options.steps)
    first, second = turns
    print(
        f"{config.parameter_count() / 1e6:.1f}M parameters, {tuple(contenders.tokens.shape)} tokens, "
        f"{torch.get_num_threads()} threads, losses {'equal' if losses[first] == losses[second] else 'DIFFER'}"
    )
    wanted = report.UNKNOWN if options.split_master else f"{1.01 if options.activations else 1.03} or less"
    table = []
    for what, times in (("wall clock", seconds), ("CPU time", cpu_seconds)):
        ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.append(
            {
                "compared": f"{first} / {second}, {what}",
                f"{first} ms": f"{1e3 * statistics.median(times[first]):.1f}",
                f"{second} ms": f"{1e3 * statistics.median(times[second]):.1f}",
                "ratio": f"{middle:.3f}",
                "quartiles": f"{low:.3f} to {high:.3f}",
                "pairs": str(len(ratios)),
                "wanted": wanted,
            }
        )
    return {
        "table": table, "parameters": config.parameter_count(), "losses_equal": losses[first] == losses[second],
        "seconds": seconds, "cpu_seconds": cpu_seconds,
    }  # fmt: skip
