"""Several owners of one model in one process, and a communicator that copies between them.

Each owner is a boosted model of its own that keeps an extent of every chunk. One backward of each, in their order, is a
round; a step of each follows. What one owner asks of the others is read where they have it.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from parity import check_at_rest, masters
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import GRADIENT, Chunk, ChunkManager
from gemini.chunk.communicator import Contribution, Span
from gemini.chunk.extent import Owner
from gemini.chunk.values import read_part


@dataclass
class Shared:
    """What owners in one process share."""

    models: "list[ref[nn.Module]]" = field(default_factory=list)
    """Weak, so that a model that is dropped goes at once."""
    sent: defaultdict[int, list[list[tuple[Contribution, Sequence[range]]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Chunk -> for each owner what it has sent, one a round."""
    gathered_numel: int = 0

    def manager(self, index: int) -> ChunkManager:
        model = self.models[index]()
        assert model is not None
        return boosted(model).manager


class Peer:
    """One owner's `Communicator`."""

    def __init__(self, owner: Owner, shared: Shared) -> None:
        self.owner = owner
        self._shared = shared

    def gather(self, span: Span, whole: Tensor, parts: Sequence[range]) -> None:
        for index, part in enumerate(parts):
            if index != self.owner.index and part:
                theirs = _read(self._shared.manager(index), span, part)
                assert theirs.numel() == len(part)
                whole[part.start : part.stop].copy_(theirs)
                self._shared.gathered_numel += len(part)

    def exchange(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> "Round":
        sent = self._shared.sent[chunk]
        while len(sent) < self.owner.count:
            sent.append([])
        gradient = None if contribution.gradient is None else contribution.gradient.clone()
        sent[self.owner.index].append((Contribution(contribution.present, gradient), extents))
        return Round(sent, len(sent[self.owner.index]) - 1, self.owner.index)

    def agree_max(self, value: Tensor) -> Tensor:
        return value  # each owner has looked at the same sums


@dataclass(frozen=True)
class Round:
    """One backward of each owner (an `Arriving`)."""

    sent: list[list[tuple[Contribution, Sequence[range]]]]
    number: int
    owner: int

    def wait(self) -> list[Contribution]:
        found = []
        for rounds in self.sent:
            assert len(rounds) > self.number, "not every owner has run its backward yet"
            contribution, extents = rounds[self.number]
            extent, gradient = extents[self.owner], contribution.gradient
            part = None if gradient is None else gradient[extent.start : extent.stop]
            found.append(Contribution(contribution.present, part))
        return found


def _read(manager: ChunkManager, span: Span, part: range) -> Tensor:
    chunk = manager.chunks[span.chunk]
    manager.quiet(chunk)
    block = 1 if span.name == GRADIENT else chunk.specs[span.name].block_numel
    index = span.start + part.start - chunk.extent.start // block
    if span.name != GRADIENT:
        return read_part(chunk, span.name, index, len(part))
    assert chunk.gradient is not None and chunk.gradient.present and chunk.gradient.buffer is not None
    manager.device.synchronize()
    flat = torch.empty(len(part), dtype=chunk.gradient.buffer.dtype)
    chunk.gradient.buffer.read(index, flat)
    return flat


Build = Callable[[], tuple[nn.Module, Any]]
"""A model and its optimizer."""
Loss = Callable[[nn.Module, int], Tensor]
"""From a model and the number of a micro-batch to its loss."""


class Owners:
    """A model that is trained by this many owners; by one, it accumulates the micro-batches of a round."""

    def __init__(self, count: int, build: Build, loss: Loss, **plugin: Any) -> None:
        self.shared = Shared()
        self.boosters, self.models, self.optimizers = [], [], []
        self._loss = loss
        for index in range(count):
            model, optimizer = build()
            made = GeminiPlugin(telemetry=False, **plugin)
            if count > 1:
                made.config = replace(made.config, communicator=Peer(Owner(index, count), self.shared))
            booster = Booster(plugin=made)
            model, optimizer, *_ = booster.boost(model, optimizer)
            self.shared.models.append(ref(model))
            self.boosters.append(booster)
            self.models.append(model)
            self.optimizers.append(optimizer)

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for model in self.models for chunk in boosted(model).manager.chunks]

    def each(self, do: Callable[[Any, Any], object]) -> None:
        """Do something to the model and the optimizer of each owner."""
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            do(model, optimizer)

    def backward(self, *numbers: int) -> list[float]:
        """Round after round, each owner computes one of these micro-batches."""
        losses = []
        for i, number in enumerate(numbers):
            owner = i % len(self.models)
            loss = self._loss(self.models[owner], number)
            self.boosters[owner].backward(loss, self.optimizers[owner])
            losses.append(loss.item())
        return losses

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def train(self, steps: int, micro_batches: int = 2) -> list[float]:
        losses = []
        for step in range(steps):
            losses += self.backward(*range(step * micro_batches, (step + 1) * micro_batches))
            self.step()
        return losses


def check_owners(ours: Owners, alone: Owners) -> None:
    """Every owner says what one says that owns everything: masters, states, and what has been clipped."""
    theirs, saved = masters(alone.models[0]), alone.optimizers[0].state_dict()
    for model, optimizer in zip(ours.models, ours.optimizers, strict=True):
        check_at_rest(model)
        assert not [name for name, value in masters(model).items() if not torch.equal(value, theirs[name])]
        state = optimizer.state_dict()
        assert state["param_groups"] == saved["param_groups"] and state["state"].keys() == saved["state"].keys()
        for number, entries in saved["state"].items():
            assert entries.keys() == state["state"][number].keys()
            for name, value in entries.items():
                assert torch.equal(torch.as_tensor(state["state"][number][name]), torch.as_tensor(value)), name
