"""The other ranks, as chunks know them: a `Communicator` that hands each letter to the part that it is for."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from ..chunk.communicator import Contribution, Delivery, Source, Span, Word
from ..chunk.extent import Owner
from ..chunk.memory import Transfer
from ..chunk.names import GRADIENT
from ..chunk.workers import close_in_background
from ..errors import RankError
from .errands import Errands
from .farewell import END_SECONDS, Farewell
from .fetches import Fetches
from .mailbox import Mailbox
from .messages import (
    AnyLetter,
    Done,
    Failure,
    Finished,
    Goodbye,
    Part,
    Pause,
    Ping,
    Received,
    Request,
    RoundEnd,
    Task,
    Vote,
    Waiting,
    Withdrawal,
)
from .patience import Patience
from .reduction import Reduction
from .service import Service
from .votes import Votes

_HELP_SECONDS = 1.0
"""How long the first rank waits for others that can do a part of what it does; without them it does all."""


class Peers:
    """The communicator of one boosted model.

    Parameters
    ----------
    mailbox
        Reaches all ranks that train the model.
    shard_size
        How many of them keep it together; the next as many keep it once more, and so on.
    gradient_factor
        What each multiplies its gradients with before they are summed.
    """

    def __init__(self, mailbox: Mailbox, shard_size: int, gradient_factor: float = 1.0) -> None:
        self.owner = Owner(mailbox.index % shard_size, shard_size, len(mailbox.names) // shard_size)
        self.gradient_factor = gradient_factor
        self.is_silent = False
        self.wait_seconds = 0.0
        """How long this rank has waited for others where all do something together, since it was taken last."""
        self._mailbox = mailbox
        self._epoch = 0
        self._source: Callable[[], Source | None] = _nothing
        self._failure = ""
        """Why a backward of ours has failed since the ranks last came together."""
        self._farewell = Farewell(mailbox, self._retire, self._end)
        patience = Patience(mailbox, self._farewell)
        self._errands = Errands(mailbox, patience)
        self._votes = Votes(mailbox, patience)
        self._fetches = Fetches(mailbox, mailbox.index - self.owner.index)
        self._service = Service(mailbox)
        self._reduction = Reduction(mailbox, patience, self._answer)
        mailbox.listen(self._received, self._farewell.is_over)
        self._farewell.begin()

    @property
    def rank(self) -> int:
        return self._mailbox.index

    # -- letters

    def _received(self, sender: int, letter: AnyLetter) -> None:
        match letter:
            case Request():
                self._service.received(sender, letter)
                self._answer()
            case Failure():
                self._fetches.received(letter)
            case Part() | Received() | RoundEnd() | Pause():
                self._reduction.received(sender, letter)
            case Vote() | Withdrawal():
                self._votes.received(sender, letter)
            case Finished() | Waiting() | Task() | Done():
                self._errands.received(sender, letter)
            case Goodbye():
                self._farewell.received(sender, letter)
                self._reduction.gone(sender)
                self._votes.notice()
            case Ping():
                pass

    # -- values

    def serve(self, source: Source) -> None:
        self._source = ref(source)
        self._reduction.serve(self._source)
        self._answer()

    def gather(self, span: Span, whole: Tensor, parts: Sequence[range]) -> Transfer:
        reduction = self._reduction
        return self._fetches.begin(span, whole, parts, self._epoch, reduction.rounds, reduction.generation)

    def advance(self) -> None:
        self._epoch += 1
        self._answer()

    def _answer(self) -> None:
        self._service.release(self._source(), self._judge)

    def _judge(self, request: Request) -> str | None:
        if request.epoch < self._epoch:
            return f"it has gone on to state {self._epoch}, and was asked for state {request.epoch}"
        if request.epoch > self._epoch:
            return None
        if request.name == GRADIENT:
            if request.generation != self._reduction.generation:
                return "it has dropped its gradients, or the others have"
            return "" if self._reduction.are_summed(request.chunk, request.rounds) else None
        return ""

    # -- gradients

    def send(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> Delivery:
        return self._reduction.send(chunk, contribution, extents)

    def end_round(self) -> None:
        self._reduction.end_round()

    def collect(self, doing: str, has_changed: bool) -> bool:
        reduction = self._reduction
        own: Word = [reduction.rounds, reduction.generation, self._failure, has_changed]
        reduction.pause(self._votes.number)
        try:
            words = [tuple(word) for word in self.agree(doing, own) if isinstance(word, list)]
        except RankError:
            reduction.forget_until(reduction.generation + 1)  # as the others do, whether they had some or not
            raise
        generations = [generation for _, generation, _, _ in words]
        failures = {index: failure for index, (_, _, failure, _) in enumerate(words) if failure}
        if failures or len(set(generations)) > 1:
            reduction.forget_until(max(generations) + 1)
            self._failure = ""
            raise RankError(self._why_in_vain(doing, failures, generations))
        reduction.come_to(max(rounds for rounds, _, _, _ in words))
        reduction.wait_for_all()
        return any(has_changed for _, _, _, has_changed in words)

    def _why_in_vain(self, doing: str, failures: dict[int, str], generations: list[int]) -> str:
        names = self._mailbox.names
        if failures:
            why = "; ".join(f"a backward failed on {names[index]}: {text}" for index, text in failures.items())
        else:
            counts = ", ".join(f"{name}: {count}" for name, count in zip(names, generations, strict=True))
            why = f"the ranks have dropped their gradients a different number of times ({counts})"
        return (
            f"{doing} has no gradients to work with: {why}. Nothing was changed, and the gradients of all ranks have "
            "been dropped. Run forward and backward again on every rank, or skip this step on all"
        )

    def wait_for_sums(self, chunk: int) -> None:
        self._reduction.wait_for_sums(chunk, self._reduction.rounds)

    def forgetting_gradients(self, failure: str = "") -> AbstractContextManager[None]:
        self._failure = self._failure or failure
        return self._reduction.forgetting()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.is_silent = self.is_silent, True
        try:
            yield
        finally:
            self.is_silent = before

    # -- agreement

    def agree(self, doing: str, word: Word = None) -> Sequence[Word]:
        begin = time.perf_counter()
        try:
            return self._votes.agree(doing, word, self._epoch)
        finally:
            self.wait_seconds += time.perf_counter() - begin

    def take_wait_seconds(self) -> float:
        waited, self.wait_seconds = self.wait_seconds, 0.0
        return waited

    def copy_from_first(self, values: Tensor) -> None:
        flat = values.detach().to("cpu", copy=True).contiguous().view(-1) if self.rank == 0 else None
        if flat is not None:
            works = [self._mailbox.send(to, self._mailbox.tag_to_send(), flat) for to in self._mailbox.others]
        else:
            flat = torch.empty(values.numel(), dtype=values.dtype, device="cpu")
            works = [self._mailbox.receive(0, self._mailbox.tag_to_send(), flat)]
        for work in works:
            work.wait()
        if self.rank:
            with torch.no_grad():
                values.copy_(flat.view(values.shape))

    def helpers(self, what: str) -> list[int]:
        others = range(1, self.owner.count)  # those after them have the same at home
        return self._errands.helpers(self._at_state(what), others, _HELP_SECONDS)

    def give_out(self, what: str, word: Word, to: Sequence[int]) -> None:
        self._errands.give_out(self._at_state(what), word, to)

    def take_back(self, what: str, among: Sequence[int]) -> None:
        self._errands.take_back(self._at_state(what), among, lambda: self._service.answered)

    def finish(self, what: str, error: str = "") -> None:
        self._errands.finish(self._at_state(what), error)

    def wait_until_finished(self, what: str, help: Callable[[Word], None] | None = None) -> None:
        self._errands.wait(self._at_state(what), help, lambda: self._service.answered)

    def _at_state(self, what: str) -> str:
        return f"{what} (state {self._epoch})"

    # -- the end

    def leave(self, close: Callable[[], None]) -> None:
        close_in_background(partial(self._farewell.leave, close))

    def _retire(self) -> None:
        """Our program is over, or our model is gone."""
        self._reduction.gone(self._mailbox.index)

    def _end(self) -> None:
        self._service.close(END_SECONDS)
        self._reduction.close(END_SECONDS)


def _nothing() -> None:
    """The source of a model that is not built yet."""
