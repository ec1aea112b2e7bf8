"""Trains one GPT2 in a process of its own, one step for each line on stdin, under one memory manager.

    python step_worker.py KIND '{"n_layer": 6, ...}' BATCH LENGTH

Answers are JSON lines on the real stdout; what the managers print goes to stderr. Runs in two environments, ours and
that of the peers, so whatever belongs to one of them is imported late.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

Step = Callable[[], torch.Tensor]
RATE = 1e-4


def plain(model: Any, batch: dict[str, torch.Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step() -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def gemini(model: Any, batch: dict[str, torch.Tensor], **plugin: Any) -> Step:
    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin

    booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
    model, optimizer, *_ = booster.boost(model, torch.optim.AdamW(model.parameters(), lr=RATE, fused=True))

    def step() -> torch.Tensor:
        loss = model(**batch).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def fsdp2(model: Any, batch: dict[str, torch.Tensor], **policy: Any) -> Step:
    """With the parameters, gradients and states of its blocks in RAM, and gathered block by block."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    options = {
        "mesh": init_device_mesh("cpu", (1,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=False),
        "mp_policy": MixedPrecisionPolicy(**policy),
    }
    for block in model.transformer.h:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return plain(model, batch)


def deepspeed(model: Any, batch: dict[str, torch.Tensor], stage: int) -> Step:
    import socket

    import deepspeed as ds

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ds.init_distributed(dist_backend="gloo")
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": len(batch["input_ids"]), "bf16": {"enabled": True},
        "zero_optimization": zero, "optimizer": {"type": "AdamW", "params": {"lr": RATE}},
        "steps_per_print": 10**9,
    }  # fmt: skip
    engine, *_ = ds.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step() -> torch.Tensor:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        return loss

    return step


KINDS: dict[str, Callable[[Any, dict[str, torch.Tensor]], Step]] = {
    "plain fp32": plain,
    "ours, fp32": lambda model, batch: gemini(model, batch, precision="fp32"),
    "FSDP2, fp32": fsdp2,
    "ours, bf16": gemini,
    "FSDP2, bf16": lambda model, batch: fsdp2(model, batch, param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "ZeRO-Offload (stage 2), bf16": lambda model, batch: deepspeed(model, batch, 2),
    "ZeRO-Offload (stage 3), bf16": lambda model, batch: deepspeed(model, batch, 3),
}
"""All keep fp32 masters."""

IMPORTS = {"ours": "gemini.booster.plugin", "FSDP2": "torch.distributed.fsdp", "ZeRO": "deepspeed"}
"""By how a kind begins: what must be there before memory is counted."""


def resident(field: str) -> int:
    """Bytes; a field of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) << 10


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind, fields, batch_size, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if (manager := next((name for start, name in IMPORTS.items() if kind.startswith(start)), None)) is not None:
        importlib.import_module(manager)
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**off, **fields))
    parameters = sum(p.numel() for p in model.parameters())
    before = resident("VmRSS") - 4 * parameters
    tokens = torch.randint(0, fields["vocab_size"], (batch_size, length))
    step = KINDS[kind](model, {"input_ids": tokens, "labels": tokens})
    del model
    print(json.dumps({"parameters": parameters}), file=answers, flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - begin
        took = {"seconds": seconds, "loss": loss.item(), "peak_bytes": resident("VmHWM") - before}
        print(json.dumps(took), file=answers, flush=True)


if __name__ == "__main__":
    main()
