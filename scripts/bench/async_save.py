"""What saving in the background costs training: steps without a save, while one is under way, and around a plain one.

    python scripts/bench async_save [--layers 8 --hidden 768 --batch-size 8 --rounds 5 --snapshot-memory 2GiB]

Each round trains some steps without saving, begins ``booster.save(..., use_async=True)`` and trains until the
checkpoint is there, and calls ``booster.save`` without it. Steps are compared by their time on the clock, the call that
begins a save included; memory by the highest resident set of each phase. The files of both are compared, too.
"""

import argparse
import filecmp
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig

SETTLING = 4
"""Steps before the measured ones."""
_MEBI = 1 << 20


class Training:
    """A model that trains and is saved."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = GPTConfig(layers=options.layers, hidden=options.hidden, heads=options.hidden // 64, seq_len=128)
        model: Any = GPT2LMHeadModel(config)
        self.numel = sum(parameter.numel() for parameter in model.parameters())
        plugin = GeminiPlugin(
            telemetry=False, precision=options.precision, snapshot_memory=options.snapshot_memory,
            host_memory=options.host_memory, offload_dir=options.offload_dir, device_memory=options.device_memory,
        )  # fmt: skip
        self.booster = Booster(plugin=plugin)
        self.model, self.optimizer, *_ = self.booster.boost(model, HybridAdam(model.parameters(), lr=1e-4))
        self.tokens = torch.randint(0, 256, (options.batch_size, 128))
        self.snapshots = boosted(self.model).manager.snapshots

    def step(self) -> None:
        self.booster.backward(self.model(self.tokens, self.tokens), self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            self.step()
        boosted(self.model).manager.settle()
        return (time.perf_counter() - begin) / count

    def save(self, folder: Path, is_async: bool) -> float:
        begin = time.perf_counter()
        self.booster.save(folder, model=self.model, optimizer=self.optimizer, keep=1, use_async=is_async)
        return time.perf_counter() - begin

    def steps_while_saving(self, folder: Path) -> tuple[float, float, int]:
        """Seconds of a step, of the call, and the most bytes of copies."""
        begin, call, count, copies = time.perf_counter(), self.save(folder, is_async=True), 0, 0
        while self.snapshots.is_under_way:
            self.step()
            copies = max(copies, self.snapshots.nbytes)
            count += 1
        boosted(self.model).manager.settle()
        seconds = (time.perf_counter() - begin) / max(count, 1)
        self.booster.wait_until_finished()
        return seconds, call, copies


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="without a save, in each round")
    parser.add_argument("--precision", default="bf16")
    for name in ("--snapshot-memory", "--host-memory", "--device-memory"):
        parser.add_argument(name)
    parser.add_argument("--offload-dir", type=Path)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary one by default")


def run(options: argparse.Namespace) -> dict[str, Any]:
    training = Training(options)
    training.steps(SETTLING)
    rows: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        now, later = Path(name, "now"), Path(name, "later")
        for _ in range(options.rounds):
            forget_peak()
            without, peak = training.steps(options.steps), peak_bytes()
            forget_peak()
            during, call, copies = training.steps_while_saving(later)
            rows.append((without, during, call, training.save(now, is_async=False), copies, peak_bytes() - peak))
            print(f"{without:.3f} s without, {during:.3f} s while saving", flush=True)
        training.save(later, is_async=True)
        training.booster.wait_until_finished()
        (one,), (other,) = now.glob("checkpoint-*"), later.glob("checkpoint-*")
        same = all(filecmp.cmp(file, other / file.name, shallow=False) for file in one.glob("*.safetensors"))
    without, during, call, plain, copies, more = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(row[1] / row[0] for row in rows)
    limit = training.snapshots.limit_bytes
    print(f"{training.numel / 1e6:.0f}M parameters, {training.numel * 12 / _MEBI:.0f} MiB a checkpoint")
    table = [
        {
            "s a step without a save": f"{without:.3f}",
            "while saving": f"{during:.3f}",
            "ratio": f"{ratio:.3f}",
            "the call": f"{call:.3f}",
            "a save without async": f"{plain:.3f}",
            "MiB of copies": f"{copies / _MEBI:.0f} of {limit / _MEBI:.0f}",
            "resident, more": f"{more / _MEBI:.0f}",
            "same files": "yes" if same else "NO",
        }
    ]
    return {"table": table, "ok": same, "rounds": rows}
