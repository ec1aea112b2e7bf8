"""What management costs where everything fits: managed steps against unmanaged ones with the same optimizer.

    python scripts/bench/overhead.py [--layers 16 --hidden 768 --seq-len 256]

Both models in one process, in turns, a few steps at a time; a turn of the managed one ends when its last update does,
so that none of its work falls into the other's time. fp32, where both do the same arithmetic with the same kernel. The
ratio is the median over the pairs of turns; who begins alternates.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1, help="in a turn")
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    config = GPTConfig(
        layers=options.layers, hidden=options.hidden, heads=options.hidden // 64, seq_len=options.seq_len
    )
    tokens = torch.randint(0, 256, (options.batch_size, options.seq_len))
    losses: dict[str, list[float]] = {"unmanaged": [], "managed": []}

    def build() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        return model, HybridAdam(model.parameters(), lr=1e-4)

    def unmanaged() -> Callable[[], None]:
        model, optimizer = build()

        def turn() -> None:
            for _ in range(options.steps):
                loss = model(tokens, tokens)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses["unmanaged"].append(loss.item())

        return turn

    def managed() -> Callable[[], None]:
        model, optimizer = build()
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
        model, optimizer, *_ = booster.boost(model, optimizer)

        def turn() -> None:
            for _ in range(options.steps):
                loss = model(tokens, tokens)
                booster.backward(loss, optimizer)
                optimizer.step()
                optimizer.zero_grad()
                losses["managed"].append(loss.item())
            list(model.named_parameters())  # waits for the updates

        return turn

    turns = {"unmanaged": unmanaged(), "managed": managed()}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(options.turns + 1):
        for name in sorted(turns, reverse=bool(number % 2)):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            turns[name]()
            if number:  # the first compiles and warms up
                seconds[name].append((time.perf_counter() - begin) / options.steps)
                cpu_seconds[name].append((time.process_time() - cpu_begin) / options.steps)
    print(
        f"{config.parameter_count() / 1e6:.1f}M parameters, {tuple(tokens.shape)} tokens, fp32, "
        f"{torch.get_num_threads()} threads, losses {'equal' if losses['managed'] == losses['unmanaged'] else 'DIFFER'}"
    )
    for name, of_turn in seconds.items():
        print(f"{name:<12}{1e3 * statistics.median(of_turn):9.1f} ms a step")
    for what, times in (("wall clock", seconds), ("CPU time (other programs matter less)", cpu_seconds)):
        ratios = [m / u for m, u in zip(times["managed"], times["unmanaged"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"managed / unmanaged, {what}: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}, {len(ratios)} pairs"
        )
    print("wanted: 1.03 or less")


if __name__ == "__main__":
    main()
