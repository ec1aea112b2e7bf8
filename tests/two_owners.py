"""Several owners of one model in one process, and a communicator that copies between them.

Each owner is a boosted model of its own that keeps an extent of every chunk. One backward of each, in their order, is a
round; a step of each follows. What one owner asks of the others is read where they have it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from parity import check_at_rest, masters
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Chunk, ChunkManager
from gemini.chunk.communicator import Contribution, Delivered, Source, Span, Word
from gemini.chunk.extent import Owner
from gemini.chunk.served import Served
from gemini.chunk.shared_gradient import SharedGradient
from gemini.ranks.rounds import Rounds


@dataclass
class Shared:
    """What owners in one process share."""

    models: "list[ref[nn.Module]]" = field(default_factory=list)
    """Weak, so that a model that is dropped goes at once."""
    orders: list[Rounds[Contribution]] = field(default_factory=list)
    """For each owner, the order in which it sums what has been sent."""
    rounds: list[int] = field(default_factory=list)
    """The backwards that each has run."""
    gathered_numel: int = 0

    def manager(self, index: int) -> ChunkManager:
        model = self.models[index]()
        assert model is not None
        return boosted(model).manager


class Peer:
    """One owner's `Communicator`."""

    is_silent = False
    gradient_factor = 1.0

    def __init__(self, owner: Owner, shared: Shared) -> None:
        self.owner = owner
        self.rank = owner.index
        self._shared = shared
        if len(shared.orders) < owner.count:
            shared.orders.append(Rounds(owner.count))
            shared.rounds.append(0)

    def no_sync(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def serve(self, source: Source) -> None:
        pass

    def gather(self, span: Span, whole: Tensor, parts: Sequence[range]) -> "Copies":
        return Copies(self._shared, self.owner.index, span, whole, parts)

    def send(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> Delivered:
        own, shared = self.owner.index, self._shared
        for index, extent in enumerate(extents):
            part = contribution.gradient[extent.start : extent.stop].clone()
            sent = Contribution(contribution.present, part, contribution.anew)
            self._sum(index, chunk, shared.orders[index].arrived(chunk, own, shared.rounds[own], sent))
        return Delivered()

    def _sum(self, index: int, chunk: int, contributions: list[Contribution]) -> None:
        gradient = self._shared.manager(index).chunks[chunk].gradient
        assert isinstance(gradient, SharedGradient)
        for contribution in contributions:
            gradient.sum(contribution)

    def end_round(self) -> None:
        self._come_to(self.owner.index, self._shared.rounds[self.owner.index] + 1)

    def _come_to(self, owner: int, rounds: int) -> None:
        self._shared.rounds[owner] = rounds
        for index, order in enumerate(self._shared.orders):
            for chunk, contribution in order.ended(owner, rounds):
                self._sum(index, chunk, [contribution])

    def collect(self, doing: str, has_changed: bool) -> bool:
        rounds = max(self._shared.rounds)
        for owner in range(self.owner.count):
            self._come_to(owner, rounds)
        return True

    def wait_for_sums(self, chunk: int) -> None:
        pass

    def forgetting_gradients(self, failure: str = "") -> AbstractContextManager[None]:
        return nullcontext()

    def agree(self, doing: str, word: Word = None) -> list[Word]:
        return [word]

    def take_wait_seconds(self) -> float | None:
        return None

    def copy_from_first(self, values: Tensor) -> None:
        raise NotImplementedError

    def helpers(self, what: str) -> Sequence[int]:
        return ()

    def give_out(self, what: str, word: Word, to: Sequence[int]) -> None:
        raise NotImplementedError

    def take_back(self, what: str, among: Sequence[int]) -> None:
        raise NotImplementedError

    def finish(self, what: str, error: str = "") -> None:
        pass

    def wait_until_finished(self, what: str, help: Callable[[Word], None] | None = None) -> None:
        pass

    def advance(self) -> None:
        pass

    def leave(self, close: Callable[[], None]) -> None:
        close()


@dataclass
class Copies:
    """Values that are copied when they are needed: by then all owners have come as far (a `Transfer`)."""

    shared: Shared
    owner: int
    span: Span
    whole: Tensor
    parts: Sequence[range]

    def wait(self) -> None:
        for index, part in enumerate(self.parts):
            if index != self.owner and part:
                theirs = _read(self.shared.manager(index), self.span, part)
                assert theirs.numel() == len(part)
                self.whole[part.start : part.stop].copy_(theirs)
                self.shared.gathered_numel += len(part)

    def done(self) -> bool:
        return False

    def rest(self, seconds: float) -> None:
        pass


def _read(manager: ChunkManager, span: Span, part: range) -> Tensor:
    manager.full_copies.bring_home(manager.chunks[span.chunk])
    span = Span(span.chunk, span.name, span.start + part.start)
    gradient = manager.chunks[span.chunk].gradient
    codec = manager.chunks[span.chunk].codecs.get(span.name)
    dtype = codec.dtype if codec is not None else gradient.buffer.dtype  # type: ignore[union-attr]
    return Served(manager.chunks, manager.device).read(span, len(part), dtype)


class OfOwner(GeminiPlugin):
    """A plugin whose model one of several owners keeps."""

    def __init__(self, peer: Peer, **options: Any) -> None:
        super().__init__(**options)
        self._peer = peer

    def join_ranks(self) -> Peer:
        return self._peer


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
            options = {"telemetry": False, **plugin}
            peer = Peer(Owner(index, count), self.shared)
            booster = Booster(plugin=GeminiPlugin(**options) if count == 1 else OfOwner(peer, **options))
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
