"""One training of the demo's comparison, in a child with a cap on RAM that the system enforces.

Children are forked from a process that has loaded all libraries of both sides, so both begin with the same memory. The
cap (``RLIMIT_DATA``) is what they may take beyond that: every private writable page counts, used or not.
"""

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from demo_model import Batch, Encoder, Pages, configuration
from safetensors.torch import load_file

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam
from gemini.process_wide import return_freed_memory

WEIGHT_DECAY = 0.01
WARM_UP_STEPS = 20
LOSSES = 9
"""Shown in the given time, beside the first one."""
HELD_OUT_BATCHES = 6
HOST_MEMORY = "32MiB"
"""For parameters, gradients and optimizer states of ours, 364 MB in all; the others are on the disk."""

Step = Callable[[Batch], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one training is to do."""

    folder: Path
    """With `configuration`."""
    weights: Path
    """Written by `write_weights`."""
    layers: int | None
    """How many of the last ones train; None for all of the model."""
    offload: Path | None
    """Where ours keeps what does not fit; None for plain PyTorch."""
    rate: float
    cap: int | None = None
    """Bytes beyond what the libraries take."""
    core: int | None = None
    """The only one that it may use."""
    seconds: float | None = None
    steps: int | None = None
    """It ends after these seconds, or these steps."""
    shown_at: tuple[int, ...] = ()
    """Steps after which the loss is shown; by default after equal times."""


def plain(asked: Asked) -> tuple[Any, Any, Step]:
    """PyTorch as it is, with the settings of malloc that ours has and gradients freed after each step."""
    return_freed_memory()
    with torch.device("meta"):
        model = Encoder(configuration(asked.folder))
    model.load_state_dict(load_file(asked.weights), strict=False, assign=True)
    for name, buffer in list(model.bert.embeddings.named_buffers()):
        model.bert.embeddings.register_buffer(name, fresh_buffer(name, buffer), persistent=False)
    if asked.layers is not None:
        model.last_layers(asked.layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.rate, weight_decay=WEIGHT_DECAY, fused=True)

    def step(batch: Batch) -> None:
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, optimizer, step


def fresh_buffer(name: str, buffer: torch.Tensor) -> torch.Tensor:
    """Of the embeddings: positions, or zeros for the types of tokens."""
    if name == "position_ids":
        return torch.arange(buffer.size(-1)).expand(buffer.shape)
    return torch.zeros(buffer.shape, dtype=buffer.dtype)


def ours(asked: Asked) -> tuple[Any, Any, Step]:
    """The same with the plugin: most of the cap is for what the model computes, model data get `HOST_MEMORY` of it."""
    with LazyInitContext():
        model: Any = Encoder(configuration(asked.folder))
    plugin = GeminiPlugin(
        precision="fp32", offload_dir=str(asked.offload), host_memory=HOST_MEMORY,
        activation_policy="recompute", update_in_backward=True,
    )  # fmt: skip
    booster = Booster(plugin=plugin)
    optimizer: Any = HybridAdam(model.parameters(), lr=asked.rate, weight_decay=WEIGHT_DECAY)
    model, optimizer, *_ = booster.boost(model, optimizer)
    booster.load_model(model, str(asked.weights))

    def step(batch: Batch) -> None:
        booster.backward(model(*batch), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def train(asked: Asked, pages: Pages, tell: Callable[[dict[str, Any]], None]) -> None:
    """Until the seconds, or the steps, are over. Looking at the loss does not count."""
    model, optimizer, step = plain(asked) if asked.offload is None else ours(asked)
    parameters = list(model.parameters())
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    tell({"parameters": sum(each.numel() for each in parameters), "trained": trained})
    spent, due, number = 0.0, 0.0, 0
    while True:
        is_over = spent >= asked.seconds if asked.seconds is not None else number >= (asked.steps or 0)
        if is_over or number in asked.shown_at or (asked.seconds is not None and spent >= due):
            tell({"seconds": spent, "steps": number, "loss": held_out_loss(pages, model)})
            due += (asked.seconds or 0.0) / LOSSES
        if is_over:
            return
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = asked.rate * min(1.0, (number + 1) / WARM_UP_STEPS)
        step(pages.batch(number, is_held_out=False))
        number += 1
        spent += time.perf_counter() - begin


def held_out_loss(pages: Pages, model: Any) -> float:
    with torch.no_grad():
        losses = [float(model(*pages.batch(10**6 + each, is_held_out=True))) for each in range(HELD_OUT_BATCHES)]
    return sum(losses) / len(losses)


def data_bytes() -> int:
    """What counts for RLIMIT_DATA."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmData:")[1].split()[0]) << 10


def _child(asked: Asked, pages: Pages, told: Connection, libraries: int) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        if asked.core is not None:
            os.sched_setaffinity(0, {asked.core})
        if asked.cap is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (libraries + asked.cap,) * 2)
        torch.manual_seed(0)
        train(asked, pages, lambda values: told.send_bytes(json.dumps(values).encode()))
        told.send_bytes(b'{"ended": true}')
    except BaseException as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        told.send_bytes(json.dumps({"error": said[:2000]}).encode())
        raise


def start(asked: Asked, pages: Pages, libraries: int) -> tuple[Any, Connection]:
    """A child that trains, and where it tells about it: lines of JSON."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(asked, pages, sender, libraries))
    child.start()
    sender.close()
    return child, receiver
