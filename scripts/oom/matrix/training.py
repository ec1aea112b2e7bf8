"""A training of a case, by plain PyTorch and by ours. Both draw the same values and see the same micro-batches."""

import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import models
from .cases import Case
from .models import USUAL, Size

STEPS = 3
_LR, _DECAY = 1e-3, 0.01
_SEED = 11
_CHUNKS = 6
"""How many chunks a model has, about: few, so that one that is kept by mistake is more than the tolerance of a peak."""
_RING_CHUNKS = 12
_SLACK_BYTES = 2 << 20
"""Beside what is in proportion to the model."""


class Plain:
    """PyTorch and nothing else: one process that takes the micro-batches of all ranks.

    In bf16 it has fp32 masters, as mixed precision has: parameters are their rounded copies.
    """

    def __init__(self, case: Case, *, tiny: bool, size: Size = USUAL) -> None:
        self._case, self._size = case, size
        torch.manual_seed(_SEED)
        self._model: Any = models.build(case.model, tiny=tiny, size=size)
        if case.model == "lora":
            self._model = models.adapted(self._model)
        self._model.train()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._masters = trained
        if case.precision != "fp32":
            self._masters = [nn.Parameter(p.detach().clone()) for p in trained]
            for parameter in self._model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self._trained = trained
        self._optimizer = torch.optim.AdamW(self._masters, lr=_LR, weight_decay=_DECAY, fused=True)

    def step(self, number: int, rank: int) -> list[float]:
        """One step; the losses of all ranks."""
        losses = []
        for each in range(self._case.ranks):
            loss = _loss(self._case, self._size, self._model, number, each)
            loss.backward()
            losses.append(float(loss.detach()))
        if self._masters is not self._trained:
            for master, parameter in zip(self._masters, self._trained, strict=True):
                master.grad = parameter.grad.float() if parameter.grad is not None else None
                parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters is not self._trained:
            for master, parameter in zip(self._masters, self._trained, strict=True):
                parameter.data.copy_(master.detach())
        return losses

    def rest(self) -> dict[str, Any]:
        return {}


class Ours:
    """The same under management, within the capacities that the case's tier has.

    Parameters
    ----------
    only_folder
        Nothing is said but where the disk tier is.
    """

    def __init__(self, case: Case, folder: Path, *, tiny: bool, size: Size = USUAL, only_folder: bool = False) -> None:
        from gemini.booster import Booster
        from gemini.booster.plugin import GeminiPlugin
        from gemini.lazy import LazyInitContext
        from gemini.nn.optimizer import HybridAdam

        self._case, self._size = case, size
        torch.manual_seed(_SEED)
        with LazyInitContext() if case.init == "lazy" else nullcontext():
            model: Any = models.build(case.model, tiny=tiny, size=size)
            if case.model == "lora":
                model = models.adapted(model)
        model.train()
        optimizer: Any = HybridAdam(model.parameters(), lr=_LR, weight_decay=_DECAY)
        options = _options(case, model, folder)
        if only_folder:
            options = {"precision": "fp32", "offload_dir": str(folder), "telemetry": False}
        self._booster = Booster(plugin=GeminiPlugin(**options))
        self._model, self._optimizer, *_ = self._booster.boost(model, optimizer)
        self._uncounted_bytes = _watch_evictions(self._model)

    def step(self, number: int, rank: int) -> list[float]:
        """One step; the loss of this rank."""
        loss = _loss(self._case, self._size, self._model, number, rank)
        self._booster.backward(loss, self._optimizer)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return [float(loss.detach())]

    def rest(self) -> dict[str, Any]:
        """Wait for the last updates; what is in use then, and how often full copies came and went."""
        from gemini.boosted import boosted

        stats = self._model.memory_stats()
        state = boosted(self._model)
        state.manager.settle()
        gc.collect()
        chunks = state.manager.chunks
        return {
            "pinned": sum(chunk.pins > 0 for chunk in chunks),
            "chunks": len(chunks),
            "chunk_bytes": max((chunk.full_nbytes for chunk in chunks), default=0),
            "evictions": state.manager.moves.evict_count,
            "ledger_bytes": state.manager.ledger.ram_bytes,
            "uncounted_bytes": max(self._uncounted_bytes, default=0),
            "saved_tensors_left": int(stats.get("activation/offload_bytes", 0)),
        }


def _watch_evictions(model: Any) -> list[int]:
    """At each eviction from now on, the memory that full copies have less what is counted for them, to the byte.

    It does not depend on other ranks, nor on what else is resident. A full copy that was not freed is seen between its
    eviction and its next fetch only, so it is not enough to look at the end.
    """
    from gemini.boosted import boosted

    found: list[int] = []
    manager: Any = weakref.ref(boosted(model).manager)  # what this holds must not keep the model
    evict = type(manager().full_copies).evict

    def watched(chunk: Any) -> None:
        copies = manager().full_copies
        evict(copies, chunk)
        there = sum(each.full.untyped_storage().nbytes() for each in manager().chunks if each.full_nbytes)
        found.append(there - copies.nbytes)

    manager().full_copies.evict = watched
    return found


def _loss(case: Case, size: Size, model: Any, step: int, rank: int) -> torch.Tensor:
    number = step * case.ranks + rank
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    inputs = models.batch(case.model, number, is_long=case.activations != "keep", dtype=dtype, size=size)
    torch.manual_seed(1000 + number)
    loss: torch.Tensor = model(**inputs).loss
    return loss


def _options(case: Case, model: nn.Module, folder: Path) -> dict[str, Any]:
    """What `GeminiPlugin` is told; capacities are in units of the model data, so that sizes of models may change."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    width = 4 if case.precision == "fp32" else 2
    full = width * (trained + frozen)
    masters = (4 * trained + width * frozen) // case.ranks
    states = 8 * trained // case.ranks
    beside = full if case.ranks > 1 else 0  # gradients on their way between ranks
    largest = max(p.numel() for p in model.parameters())
    options: dict[str, Any] = {
        "precision": "fp32" if case.precision == "fp32" else "bf16",
        "split_master": case.precision == "split",
        "placement_policy": case.policy,
        "activation_policy": case.activations,
        "chunk_config_dict": {1: {"chunk_size": max(largest, -(-(trained + frozen) // _CHUNKS))}},
        "telemetry": False,
        "max_prefetch": 1,
        "update_in_backward": case.tier != "disk" and case.ranks == 1,
    }
    if case.policy == "static":
        options |= {"offload_optim_frac": 1.0, "offload_param_frac": 0.5}
    if case.tier == "ring":
        options |= {"chunk_config_dict": {1: {"chunk_size": max(largest, -(-(trained + frozen) // _RING_CHUNKS))}}}
        options |= {"device_memory": full, "offload_param_frac": 0.1, "host_memory": full // 6 + _SLACK_BYTES}
    elif case.tier == "ram":
        options["host_memory"] = beside + masters + states + full + _SLACK_BYTES
    elif case.tier == "device":
        options |= {"device_memory": full // 2 + _SLACK_BYTES, "host_memory": beside + masters + _SLACK_BYTES}
    else:
        options["host_memory"] = beside + (masters + states) // 8 + full // 2 + _SLACK_BYTES
    if case.tier != "ram" or case.activations == "offload":
        options["offload_dir"] = str(folder)
    return options
