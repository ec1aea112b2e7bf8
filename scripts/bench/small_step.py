"""CPU time of a small managed step, where hooks are most of it: this checkout against another one, or none.

    git worktree add ../before REVISION
    python scripts/bench small_step --against ../before [--pairs 8]

A GPT of 6 layers of 64, everything resident (roomy) or with chunks moving (tight), and the first forward of 800
modules. Each measurement is a process of its own with one thread; the two checkouts take turns, and the ratio is the
median over the pairs. CPU time of the process, so that neighbours disturb less.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CHILD = """
import sys, time, torch
torch.set_num_threads(1)
from torch import nn
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig

def boost(model, **plugin):
    optimizer = HybridAdam(model.parameters(), lr=1e-3)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **plugin))
    return booster, *booster.boost(model, optimizer)[:2]

torch.manual_seed(0)
if sys.argv[1] == "first forward":
    layers = [m for _ in range(400) for m in (nn.Linear(16, 16), nn.LayerNorm(16))]
    _, model, _ = boost(nn.Sequential(*layers))
    begin = time.process_time()
    model(torch.randn(8, 16))
    print(1e3 * (time.process_time() - begin))
else:
    small = {"device_memory": "900KiB", "chunk_config_dict": {1: {"chunk_size": 16384}}}
    config = GPTConfig(layers=6, hidden=64, heads=4, seq_len=32)
    booster, model, optimizer = boost(GPT2LMHeadModel(config), **(small if sys.argv[1] == "tight" else {}))
    tokens, times = torch.randint(0, 256, (2, 32)), []
    for step in range(60):
        begin = time.process_time()
        booster.backward(model(tokens, tokens), optimizer)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begin)
    print(1e3 * sorted(times[20:])[len(times[20:]) // 2])
"""


def measure(checkout: Path, what: str) -> float:
    """Milliseconds of CPU time."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, what]
    child = subprocess.run(
        command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300, check=True
    )
    return float(child.stdout.split()[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--pairs", type=int, default=8)


def run(options: argparse.Namespace) -> dict[str, object]:
    results, table = {}, []
    for what in ("roomy", "tight", "first forward"):
        ours, theirs = [], []
        for _ in range(options.pairs):
            ours.append(measure(ROOT, what))
            if options.against is not None:
                theirs.append(measure(options.against.resolve(), what))
        results[what] = {"ms": statistics.median(ours)}
        row = {"what": what, "ms": f"{statistics.median(ours):.2f}"}
        if theirs:
            ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
            results[what] |= {"against_ms": statistics.median(theirs), "ratio": statistics.median(ratios)}
            row |= {"against": f"{statistics.median(theirs):.2f}", "ratio": f"{statistics.median(ratios):.3f}"}
            row["range"] = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        table.append(row)
    return {"table": table, "rows": results}
