"""Whole training steps: ours, plain PyTorch, FSDP2 with CPU offload, DeepSpeed's ZeRO-Offload, each in its own process.

They train the same GPT2 on the same batch in turns. Ratios are medians over the rounds of (this) / (ours with bf16).
The peak is what the process took beyond its imports, by the kernel's count (VmHWM). ColossalAI cannot be installed
beside our torch, so only its kernel is compared (``bench adam``).
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import peers
import report
from step_worker import KINDS
from worker_process import WorkerError, WorkerProcess

WORKER = Path(__file__).with_name("step_worker.py")
BASE = "ours, bf16"
WARM_UP = 3
"""Compiling, the warm-up step of a plan, the first step by it."""


class Trainer:
    """A worker process."""

    def __init__(self, kind: str, python: Path, options: argparse.Namespace, folder: Path) -> None:
        fields = {
            "n_layer": options.layers, "n_embd": options.hidden, "n_head": options.hidden // 64,
            "vocab_size": options.vocabulary, "n_positions": options.seq_len,
        }  # fmt: skip
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        }  # fmt: skip
        command = [python, WORKER, kind, json.dumps(fields), str(options.batch_size), str(options.seq_len)]
        self._worker = WorkerProcess(command, environment, folder / f"step {kind.replace('/', ' ')}.log")
        self.parameters: int = self._worker.first["parameters"]
        self.losses: list[float] = []
        self.peak_bytes = 0

    def step(self) -> float:
        """Train one step; its seconds."""
        took = self._worker.ask()
        self.losses.append(took["loss"])
        self.peak_bytes = took["peak_bytes"]
        seconds: float = took["seconds"]
        return seconds

    def close(self) -> None:
        self._worker.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=peers.DEFAULT_FOLDER, help="of the peers' environment")


def run(options: argparse.Namespace) -> dict[str, object]:
    trainers: dict[str, Trainer] = {}
    errors: dict[str, str] = {}
    theirs = peers.install(options.folder)
    try:
        for kind in KINDS:
            python = theirs if kind.startswith("ZeRO") else Path(sys.executable)
            try:
                trainer = Trainer(kind, python, options, options.folder)
                for _ in range(WARM_UP):
                    trainer.step()
                trainers[kind] = trainer
            except WorkerError as error:
                errors[kind] = str(error)
        seconds = report.take_turns({kind: trainer.step for kind, trainer in trainers.items()}, options.repeats)
    finally:
        for trainer in trainers.values():
            trainer.close()
    parameters = trainers[BASE].parameters
    print(
        f"{parameters / 1e6:.1f}M parameters, batch {options.batch_size} x {options.seq_len}, {options.threads} threads"
    )
    rows, table = {}, []
    for kind, trainer in trainers.items():
        ratio, peak, losses = report.ratio(seconds, kind, BASE), trainer.peak_bytes, trainer.losses
        rows[kind] = {"seconds": seconds[kind], "ratio": ratio, "peak_bytes": peak, "losses": losses}
        table.append(
            {
                "run": kind,
                "ms a step": f"{1e3 * statistics.median(seconds[kind]):.0f}",
                "to ours": f"{ratio:.2f}",
                "peak MiB": str(peak >> 20),
                "loss": f"{losses[-1]:.4f}",
            }
        )
    for kind, text in errors.items():
        print(f"{kind}: did not run: {text}")
    return {"table": table, "parameters": parameters, "rows": rows, "errors": errors}
