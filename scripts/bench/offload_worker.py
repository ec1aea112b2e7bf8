"""Trains one GPT2 with its model data in RAM or on a disk; `offload_step.py` starts it and asks it for turns.

    python offload_worker.py '{"manager": "ours", "options": {...}, "model": {...}, "batch_size": 2, "length": 256}'

Answers are JSON lines on the real stdout; what the managers print goes to stderr. Each line on stdin is a number of
steps to train. Runs in two environments, ours and that of the peers, so each imports what belongs to it late. All
compute in bf16 and keep fp32 masters.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from plain_masters import Masters
from ranks_worker import FSDP2, RATE, Batch, Gemini, Trainer, Zero3, throw_away


class PlainMasters(Trainer):
    """Plain PyTorch, in bf16 with fp32 masters."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self.model = build()
        self._masters = Masters(self.model, RATE)

    def update(self) -> None:
        self._masters.update()


MANAGERS: dict[str, tuple[str, Callable[..., Trainer]]] = {
    "plain": ("torch.optim", PlainMasters),
    "ours": ("gemini.booster.plugin", Gemini),
    "fsdp2": ("torch.distributed.fsdp", lambda build: FSDP2(build, offload=True)),
    "zero3": ("deepspeed", Zero3),
}
"""What is imported before memory is counted, and what makes the trainer."""


def resident(field: str) -> int:
    """Bytes; a field of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) << 10


def moved_bytes() -> tuple[int, int]:
    """What this process has had read from disks, and written to them, by the system's count."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def turn(trainer: Trainer, batch: Batch, steps: int) -> dict[str, Any]:
    """Train one step more than ``steps``, from the end of a backward to the end of the next one.

    In between lie an update, a forward and a backward, however a manager spreads the update over them. The turn ends
    when nothing of its last step is under way, so that what others do then has the machine to itself.
    """
    before, begin_cpu = moved_bytes(), time.process_time()
    losses, ends = [], []
    for _ in range(steps + 1):
        losses.append(trainer.backward(batch).item())
        ends.append(time.perf_counter())
        trainer.update()
    trainer.finish()
    read, written = (after - earlier for after, earlier in zip(moved_bytes(), before, strict=True))
    return {
        "seconds": [later - earlier for earlier, later in pairwise(ends)],
        "cpu_seconds": (time.process_time() - begin_cpu) / (steps + 1),
        "losses": losses,
        "read_bytes": read / (steps + 1),
        "written_bytes": written / (steps + 1),
    }


def serve(asked: dict[str, Any], answer: Callable[[dict[str, Any]], None], lines: Iterable[str]) -> None:
    module, make = MANAGERS[asked["manager"]]
    importlib.import_module(module)
    throw_away(asked["manager"])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
    imports = resident("VmRSS")
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**off, **asked["model"])
    trainer = make(lambda: transformers.GPT2LMHeadModel(config), **asked["options"])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (asked["batch_size"], asked["length"]), generator=generator)
    answer({"set_up_peak_bytes": resident("VmHWM") - imports})
    for line in lines:
        took = turn(trainer, {"input_ids": tokens, "labels": tokens}, int(line))
        answer({**took, "peak_bytes": resident("VmHWM") - imports})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers and managers print
    serve(json.loads(sys.argv[1]), lambda values: print(json.dumps(values), file=answers, flush=True), sys.stdin)


if __name__ == "__main__":
    main()
