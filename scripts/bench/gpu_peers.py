"""The same GPT under other managers on one GPU: FSDP2, DeepSpeed, optimizers of torchao and bitsandbytes."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_device import Device
from gpu_settings import Settings, Size
from gpu_step import RATE, Step, checkpointed, config_of, quick_values, timed

from gemini.train.model import GPT2LMHeadModel, GPTConfig


def _built(config: GPTConfig, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device, quick_values():
        model = GPT2LMHeadModel(config)
    checkpointed(model)
    return model


def _stepping(model: Any, optimizer: Any) -> Step:
    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _plain(config: GPTConfig, device: Device) -> Step:
    """All on the device; fp32 parameters under autocast, as mixed precision is usually written."""
    model = _built(config, device.device)
    step = _stepping(model, torch.optim.AdamW(model.parameters(), lr=RATE, fused=True))

    def in_bf16(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.device.type, dtype=torch.bfloat16):
            return step(tokens)

    return in_bf16


def _join() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _fsdp2(config: GPTConfig, device: Device) -> Step:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    _join()
    dist.init_process_group(rank=0, world_size=1)
    model = _built(config, torch.device("cpu"))
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.device.type, (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.is_accelerator),
    }
    for block in model.transformer.h:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return _stepping(model, torch.optim.AdamW(model.parameters(), lr=RATE, fused=True))


def _deepspeed(config: GPTConfig, device: Device, stage: int) -> Step:
    import deepspeed

    _join()
    deepspeed.init_distributed()
    on_cpu = {"device": "cpu", "pin_memory": device.is_accelerator}
    zero: dict[str, Any] = {"stage": stage, "offload_optimizer": on_cpu}
    if stage == 3:
        zero["offload_param"] = on_cpu
    settings = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE}}, "steps_per_print": 10**9,
    }  # fmt: skip
    model = _built(config, torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = engine(tokens, tokens)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def _torchao(config: GPTConfig, device: Device) -> Step:
    from torchao.optim import CPUOffloadOptimizer

    model = _built(config, device.device).to(torch.bfloat16)
    return _stepping(model, CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, lr=RATE, fused=True))


def _bitsandbytes(config: GPTConfig, device: Device) -> Step:
    from bitsandbytes.optim import PagedAdamW8bit

    model = _built(config, device.device).to(torch.bfloat16)
    return _stepping(model, PagedAdamW8bit(model.parameters(), lr=RATE))


PEERS: dict[str, Callable[[GPTConfig, Device], Step]] = {
    "plain PyTorch": _plain,
    "FSDP2, CPU offload": _fsdp2,
    "ZeRO-2, optimizer on CPU": lambda config, device: _deepspeed(config, device, 2),
    "ZeRO-3, all on CPU": lambda config, device: _deepspeed(config, device, 3),
    "torchao's CPUOffloadOptimizer (bf16 masters)": _torchao,
    "bitsandbytes' PagedAdamW8bit (bf16 masters)": _bitsandbytes,
}
"""What builds each. The last two keep fewer bits than the others."""


def run(device: Device, settings: Settings, size: Size, peer: str) -> Iterator[dict[str, Any]]:
    """As `gpu_step.run`."""
    if device.device.type == "sim" and peer != "plain PyTorch":
        yield {"absent": "the simulated device has no collectives"}
        return
    config = config_of(size, settings)
    begin = time.perf_counter()
    step = PEERS[peer](config, device)
    yield {"parameters": config.parameter_count(), "build_seconds": time.perf_counter() - begin}
    yield from timed(device, settings, step, config.parameter_count())
