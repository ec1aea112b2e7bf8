"""Whole training steps: ours, plain PyTorch, FSDP2 with CPU offload, DeepSpeed's ZeRO-Offload, each in its own process.

They train the same GPT2 on the same batch in turns. Ratios are medians over the rounds of (this) / (ours with bf16).
The peak is what the process took beyond its imports, by the kernel's count (VmHWM). ColossalAI cannot be installed
beside our torch, so only its kernel is compared (``bench adam``).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers
import report
from step_worker import KINDS

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
        self._log = (folder / f"step {kind.replace('/', ' ')}.log").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.parameters: int = self._answer()["parameters"]
        self.losses: list[float] = []
        self.peak_bytes = 0

    def step(self) -> float:
        """Train one step; its seconds."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        took = self._answer()
        self.losses.append(took["loss"])
        self.peak_bytes = took["peak_bytes"]
        seconds: float = took["seconds"]
        return seconds

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise peers.PeerError(f"its process ended: {self._log.read().strip()[-1500:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()


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
            except peers.PeerError as error:
                errors[kind] = str(error)
        seconds = report.take_turns({kind: trainer.step for kind, trainer in trainers.items()}, options.repeats)
    finally:
        for trainer in trainers.values():
            trainer.close()
    parameters = trainers[BASE].parameters
    print(
        f"{parameters / 1e6:.1f}M parameters, batch {options.batch_size} x {options.seq_len}, {options.threads} threads"
    )
    print(f"{'':<32}{'ms a step':>10}{'to ours':>9}{'peak MiB':>10}{'loss':>10}")
    rows = {}
    for kind, trainer in trainers.items():
        ratio, best = report.ratio(seconds, kind, BASE), sorted(seconds[kind])
        peak, losses = trainer.peak_bytes, trainer.losses
        rows[kind] = {"seconds": seconds[kind], "ratio": ratio, "peak_bytes": peak, "losses": losses}
        middle = best[len(best) // 2]
        print(f"{kind:<32}{1e3 * middle:>10.0f}{ratio:>9.2f}{peak >> 20:>10}{losses[-1]:>10.4f}")
    for kind, text in errors.items():
        print(f"{kind}: did not run: {text}")
    return {"parameters": parameters, "rows": rows, "errors": errors}
