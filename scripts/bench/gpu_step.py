"""Steps of one GPT at several numbers of tokens, with its model data in one place."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from gpu_device import Device
from gpu_settings import Settings, Size
from torch import nn
from torch.utils.checkpoint import checkpoint

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam
from gemini.train.model import GPT2LMHeadModel, GPTConfig

RATE = 1e-4
WARM_UP = 2
"""Compiling and the warm-up step of a plan, and the first step by it, at each number of tokens."""
PLACEMENTS = ("resident", "host", "streamed")
STREAMED_SHARE = 4
"""The bytes of all full copies, divided by the room that they get."""

Step = Callable[[torch.Tensor], torch.Tensor]


def config_of(size: Size, settings: Settings) -> GPTConfig:
    """Its heads are 64 wide, or 128 from a width of 4096 on."""
    head = 128 if size.hidden >= 4096 else 64
    return GPTConfig(
        layers=size.layers, hidden=size.hidden, heads=max(1, size.hidden // head), seq_len=settings.length,
        vocab_size=settings.vocabulary,
    )  # fmt: skip


def placed(placement: str, parameters: int, largest: int) -> dict[str, Any]:
    """Arguments of the plugin.

    ``resident`` has all on the device, ``host`` homes in RAM and full copies on the device, ``streamed`` homes in RAM
    and room for a quarter of the full copies: they come and go in each forward and backward.
    """
    if placement == "resident":
        return {"placement_policy": "static"}
    in_ram = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}
    if placement == "host":
        return in_ram
    room = max(2 * parameters // STREAMED_SHARE, 6 * largest)
    return {"device_memory": room}


@contextmanager
def quick_values() -> Iterator[None]:
    """Weights from a sine instead of a random generator, which takes a minute for 7B on one core."""
    before = nn.init.normal_

    def sine(tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> torch.Tensor:
        with torch.no_grad():
            values = torch.arange(tensor.numel(), dtype=torch.float32, device=tensor.device).sin_().mul_(1.4 * std)
            return tensor.copy_(values.view(tensor.shape))

    nn.init.normal_ = sine
    try:
        yield
    finally:
        nn.init.normal_ = before


def checkpointed(model: Any) -> None:
    """Have each block computed again in backward, in all trainings alike."""
    for block in model.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def managed(config: GPTConfig, plugin: dict[str, Any]) -> tuple[Step, Any]:
    """A training by ours."""
    torch.manual_seed(0)
    with LazyInitContext(), quick_values():
        model: Any = GPT2LMHeadModel(config)
    checkpointed(model)
    optimizer: Any = HybridAdam(model.parameters(), lr=RATE)
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
    model, optimizer, *_ = booster.boost(model, optimizer)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(tokens, tokens)
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, model


def run(device: Device, settings: Settings, size: Size, placement: str) -> Iterator[dict[str, Any]]:
    """One answer for each number of tokens; the first has how long building took."""
    config = config_of(size, settings)
    parameters = config.parameter_count()
    largest = max(4 * size.hidden**2, settings.vocabulary * size.hidden)
    begin = time.perf_counter()
    step, model = managed(config, placed(placement, parameters, largest))
    yield {"parameters": parameters, "build_seconds": time.perf_counter() - begin}
    yield from timed(device, settings, step, parameters, model)


def timed(
    device: Device, settings: Settings, step: Step, parameters: int, model: Any = None
) -> Iterator[dict[str, Any]]:
    """Seconds of a step at each number of tokens; one that does not fit tells so, and ends it."""
    for count in settings.tokens:
        generator = torch.Generator().manual_seed(1)
        shape = (max(1, count // settings.length), min(count, settings.length))
        tokens = torch.randint(0, settings.vocabulary, shape, generator=generator).to(device.device)
        device.forget_peak()
        losses, ends = [], []
        try:
            for _ in range(WARM_UP + settings.steps):
                losses.append(step(tokens))
                device.synchronize()
                ends.append(time.perf_counter())
        except Exception as error:  # too large at this number of tokens, so that the next is, too
            yield {"tokens": count, "error": f"{type(error).__name__}: {error}"[:300]}
            return
        seconds = (ends[-1] - ends[WARM_UP - 1]) / settings.steps
        found = {
            "tokens": count,
            "seconds": seconds,
            "tokens_per_second": count / seconds,
            "tflops": 6 * parameters * count / seconds / 1e12,
            "device_peak_bytes": device.peak_bytes(),
            "losses": [float(loss) for loss in losses],
        }
        if model is not None:
            stats = model.memory_stats()
            found |= {key: stats[key] for key in ("device/used_bytes", "host/used_bytes", "disk/used_bytes")}
        yield found
