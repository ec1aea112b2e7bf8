"""One rank of a training of GPT2 under one memory manager; `ranks.py` starts it, drives it and measures its memory.

    RANK=0 WORLD_SIZE=2 ... python ranks_worker.py KIND '{"n_layer": 8, ...}' BATCH LENGTH

Answers are JSON lines on the real stdout; what the managers print goes to stderr. After its imports and one throw-away
step, and again after building the trainer, it answers and waits for a line; then each line is a number of steps to
train. Runs in two environments, ours and that of the peers, so each imports what belongs to it late.
"""

import importlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

RATE = 1e-4
ON_CPU = {"device": "cpu"}
BYTES_RECEIVED_OFFSET = 128
"""Of ``tcpi_bytes_received`` in Linux's ``struct tcp_info``."""

Model = transformers.GPT2LMHeadModel
Batch = dict[str, torch.Tensor]


class Trainer:
    """Steps of plain PyTorch; the base of all others.

    Parameters
    ----------
    model
        Built whole on each rank, unless a subclass builds it itself.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer: Any = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step(self, batch: Batch) -> torch.Tensor:
        """One step; its loss."""
        loss = self.backward(batch)
        self.update()
        return loss

    def backward(self, batch: Batch) -> torch.Tensor:
        """Forward and backward; the loss."""
        loss: torch.Tensor = self.model(**batch).loss
        loss.backward()
        return loss

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """Wait until nothing of the last step is under way."""

    def model_data_bytes(self) -> int | None:
        """Bytes of parameters, gradients and states by the manager's own count."""


class Gemini(Trainer):
    """Ours. Gradients are summed over the ranks, not averaged, so the loss is divided by their number."""

    def __init__(self, build: Callable[[], Any], **plugin: Any) -> None:
        import gemini
        from gemini.booster import Booster
        from gemini.booster.plugin import GeminiPlugin
        from gemini.lazy import LazyInitContext
        from gemini.nn.optimizer import HybridAdam

        self.ranks = int(os.environ["WORLD_SIZE"])
        if self.ranks > 1:
            gemini.launch_from_torch({})
        with LazyInitContext():
            model = build()
        self.booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
        optimizer: Any = HybridAdam(model.parameters(), lr=RATE, weight_decay=0.01)
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)

    def backward(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.booster.backward(loss / self.ranks if self.ranks > 1 else loss, self.optimizer)
        return loss

    def finish(self) -> None:
        list(self.model.named_parameters())

    def model_data_bytes(self) -> int:
        stats = self.model.memory_stats()
        return sum(int(stats[f"{tier}/used_bytes"]) for tier in ("device", "host", "disk"))


class FSDP2(Trainer):
    """``fully_shard`` on each block and the whole; masters in fp32, computing in bf16."""

    def __init__(
        self, build: Callable[[], Any], reduce: torch.dtype = torch.float32, reshard: bool = True, offload: bool = False
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        dist.init_process_group("gloo")
        model = build()
        options: dict[str, Any] = {
            "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce),
            "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
        }
        for block in model.transformer.h:
            fully_shard(block, reshard_after_forward=reshard, **options)
        fully_shard(model, **options)
        super().__init__(model)


class Zero3(Trainer):
    """DeepSpeed with optimizer and parameters on the CPU or on a disk.

    Its buckets are cut from 5e8 elements (a gigabyte for any model) to what this model can use.

    Parameters
    ----------
    zero
        More of ``zero_optimization``, such as ``offload_optimizer``.
    aio
        How it asks a disk.
    """

    def __init__(
        self, build: Callable[[], Any], batch_size: int, zero: dict[str, Any], aio: dict[str, Any] | None = None
    ) -> None:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
        config = {
            "train_micro_batch_size_per_gpu": batch_size, "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3, "reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 10_000_000, **zero
            },
            "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.01}}, "steps_per_print": 10**9,
        }  # fmt: skip
        if aio is not None:
            config["aio"] = aio
        model = build()
        self.model, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def backward(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.model.backward(loss)
        return loss

    def update(self) -> None:
        self.model.step()


KINDS: dict[str, Callable[[Callable[[], Any], int], Trainer]] = {
    "ours": lambda build, _: Gemini(build),
    "FSDP2": lambda build, _: FSDP2(build),
    "FSDP2, bf16 reduced": lambda build, _: FSDP2(build, reduce=torch.bfloat16),
    "FSDP2, kept after forward": lambda build, _: FSDP2(build, reshard=False),
    "FSDP2, CPU offload": lambda build, _: FSDP2(build, offload=True),
    "ZeRO-3, optimizer offloaded": lambda build, batch_size: Zero3(build, batch_size, {"offload_optimizer": ON_CPU}),
    "ZeRO-3, all offloaded": lambda build, batch_size: Zero3(
        build, batch_size, {"offload_optimizer": ON_CPU, "offload_param": ON_CPU}
    ),
}
"""All compute in bf16 and keep fp32 masters."""

IMPORTS = {"ours": "gemini.booster.plugin", "FSDP2": "torch.distributed.fsdp", "ZeRO-3": "deepspeed"}
"""By how a kind begins: what must be there before memory is counted."""


def throw_away(kind: str) -> None:
    """Load what a first step loads: kernels, thread pools, the optimizer's code."""
    model = torch.nn.Linear(256, 256)
    model(torch.zeros(16, 256)).sum().backward()
    module = importlib.import_module("gemini.nn.optimizer" if kind == "ours" else "torch.optim")
    optimizer = module.HybridAdam if kind == "ours" else module.AdamW
    optimizer(model.parameters(), lr=RATE).step()


def received_bytes() -> int:
    """How much the TCP connections of this process have received."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed by now, or a socket of another protocol
            if entry.is_socket():
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("<Q", state, BYTES_RECEIVED_OFFSET)[0]
    return total


def turn(trainer: Trainer, batch: Batch, steps: int) -> dict[str, object]:
    """Train; the seconds until nothing of the steps is under way."""
    received, begin = received_bytes(), time.perf_counter()
    losses = [trainer.step(batch).detach() for _ in range(steps)]
    trainer.finish()
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds / steps,
        "losses": [loss.item() for loss in losses],
        "received_bytes": (received_bytes() - received) / steps,
    }


def serve(answer: Callable[[dict[str, object]], None], lines: Iterable[str]) -> None:
    kind, fields, batch_size, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    importlib.import_module(next(name for start, name in IMPORTS.items() if kind.startswith(start)))
    throw_away(kind)
    lines = iter(lines)
    answer({})
    next(lines)
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**off, **fields)
    trainer = KINDS[kind](lambda: Model(config), batch_size)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    tokens = torch.randint(0, fields["vocab_size"], (batch_size, length), generator=generator)
    answer({"model_data_bytes": trainer.model_data_bytes()})
    for line in lines:
        answer(turn(trainer, {"input_ids": tokens, "labels": tokens}, int(line)))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers and managers print
    serve(lambda values: print(json.dumps(values), file=answers, flush=True), sys.stdin)


if __name__ == "__main__":
    main()
