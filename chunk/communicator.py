"""The seam for several owners: what a chunk needs of the others that keep an extent of it.

Data are one-sided: `gather` and `send` ask nothing of what the others do at that moment. What changes values at home is
agreed upon first (`agree`), and counted (`advance`): an owner that gathers gets the values after the changes that it
has agreed to. Sums are made in the order of the owners, on the owner of the extent: their number never changes numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gemini.errors import RankError

from .extent import SOLE, Owner
from .memory import Transfer

Word = None | bool | int | float | str | bytes | Sequence["Word"] | Mapping[str, "Word"]
"""What an owner may tell the others."""


class Span(NamedTuple):
    """Values of one chunk, each of them at home with one owner."""

    chunk: int
    name: str
    """``"master"``, ``"gradient"`` or a state of the optimizer."""
    start: int
    """Where in the chunk's layout they begin (for values of blocks of elements: the number of the block)."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one owner's backward adds to the gradient of an extent."""

    present: Set[int]
    """Positions of the slots that have a gradient."""
    gradient: Tensor
    """Flat, on CPU, of the extent, which may be empty. What lies in other slots means nothing."""
    anew: Set[int] = frozenset()
    """Positions whose sums so far are forgotten first."""


class Delivery(Protocol):
    """A contribution on its way to the owners of its extents."""

    @property
    def is_over(self) -> bool:
        """True if all have it, so that its memory may change."""

    def wait(self) -> None:
        """Return when that is so."""


class Delivered:
    """A contribution that all have."""

    is_over = True

    def wait(self) -> None:
        pass


class Source(Protocol):
    """What the other owners may have of this one, and bring it. Called by threads of the communicator."""

    def read(self, span: Span, numel: int, dtype: torch.dtype) -> Tensor:
        """Values that are at home here (flat, on CPU), once the update under way is over. They may be the home itself.

        Raises
        ------
        Exception
            If that update failed, or the values cannot be read.
        """

    def add(self, chunk: int, contribution: Contribution) -> None:
        """Sum up a contribution to the extent that is at home here. In the order of rounds and owners."""


class Communicator(Protocol):
    """The other owners."""

    owner: Owner
    is_silent: bool
    """True while backwards keep their gradients to themselves: see `no_sync`."""
    gradient_factor: float
    """What each owner multiplies its gradients with: 1 for their sum, one over the number of owners for their mean."""

    @property
    def rank(self) -> int:
        """The place of this process among all that train the model, replicas included."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Send no gradients meanwhile: they are added up here, and sent by the first backward after it."""

    def serve(self, source: Source) -> None:
        """Answer the others from now on."""

    def gather(self, span: Span, whole: Tensor, parts: Sequence[range]) -> Transfer:
        """Fill ``whole`` (flat, on any device) with what the others have; our own part is put there by the caller.

        Parameters
        ----------
        span
            Which values these are.
        parts
            What each owner has of ``whole``.
        """

    def send(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> Delivery:
        """Send the gradient of a whole chunk from the backward under way, to each owner its extent, us among them."""

    def end_round(self) -> None:
        """The backward under way is over: all that it contributes has been sent."""

    def collect(self, doing: str, has_changed: bool) -> bool:
        """Wait until all owners are here, and the gradients of all backwards so far have been summed everywhere.

        Returns whether gradients have been changed with any owner since (``has_changed`` says so for this one).

        Raises
        ------
        RankError
            If an owner does something else or is gone, or its backward failed: the gradients are worth nothing then,
            and each owner has to drop them.
        """

    def wait_for_sums(self, chunk: int) -> None:
        """Wait until the gradients of our own backwards so far have been summed here, with those of the others."""

    def forgetting_gradients(self, failure: str = "") -> AbstractContextManager[None]:
        """A context in which the caller drops all gradients, and nothing is added to any.

        ``failure`` says why, if a backward failed.
        """

    def agree(self, doing: str, word: Word = None) -> Sequence[Word]:
        """Wait until all owners are about to do the same. Returns what each of them has to say, in their order.

        Raises
        ------
        RankError
            If an owner does something else, is gone, or does not come in time.
        """

    def take_wait_seconds(self) -> float | None:
        """How long `agree` and `collect` have waited for other owners since this was asked last; None without any."""

    def copy_from_first(self, values: Tensor) -> None:
        """Have the values (dense, on any device) of the first owner in the memory of all. All of them call it."""

    def helpers(self, what: str) -> Sequence[int]:
        """On the first owner: those others that wait for it to `finish` this, and can do a part of it."""

    def give_out(self, what: str, word: Word, to: Sequence[int]) -> None:
        """Have helpers do their parts; ``word`` tells them what these are."""

    def take_back(self, what: str, among: Sequence[int]) -> None:
        """Wait until helpers have done their parts.

        Raises
        ------
        RankError
            If one has failed, or is gone.
        """

    def finish(self, what: str, error: str = "") -> None:
        """The first owner has done what the others wait for, or has failed."""

    def wait_until_finished(self, what: str, help: Callable[[Word], None] | None = None) -> None:
        """Wait for the first owner to `finish` this.

        Parameters
        ----------
        help
            Does the part of it that the first owner may give out.

        Raises
        ------
        RankError
            If it has failed, is gone, or does not come to it in time.
        """

    def advance(self) -> None:
        """What was agreed upon has changed values at home, or begun to."""

    def leave(self, close: Callable[[], None]) -> None:
        """The model is gone here. ``close`` is called when no other owner can need its values. Also for finalizers."""


class SingleProcess:
    """The only owner: nothing is ever gathered or sent."""

    owner = SOLE
    rank = 0
    is_silent = False
    gradient_factor = 1.0

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def serve(self, source: Source) -> None:
        pass

    def gather(self, span: Span, whole: Tensor, parts: Sequence[range]) -> Transfer:
        raise NotImplementedError

    def send(self, chunk: int, contribution: Contribution, extents: Sequence[range]) -> Delivery:
        raise NotImplementedError

    def end_round(self) -> None:
        pass

    def collect(self, doing: str, has_changed: bool) -> bool:
        return has_changed

    def wait_for_sums(self, chunk: int) -> None:
        pass

    def forgetting_gradients(self, failure: str = "") -> AbstractContextManager[None]:
        return nullcontext()

    def agree(self, doing: str, word: Word = None) -> Sequence[Word]:
        return [word]

    def take_wait_seconds(self) -> float | None:
        return None

    def copy_from_first(self, values: Tensor) -> None:
        pass

    def helpers(self, what: str) -> Sequence[int]:
        return ()

    def give_out(self, what: str, word: Word, to: Sequence[int]) -> None:
        pass

    def take_back(self, what: str, among: Sequence[int]) -> None:
        pass

    def finish(self, what: str, error: str = "") -> None:
        pass

    def wait_until_finished(self, what: str, help: Callable[[Word], None] | None = None) -> None:
        pass

    def advance(self) -> None:
        pass

    def leave(self, close: Callable[[], None]) -> None:
        close()


ALONE = SingleProcess()


@contextmanager
def all_or_none(communicator: Communicator, doing: str, word: Callable[[], str] = str) -> Iterator[None]:
    """Do what may fail on one owner before something that all do: if it fails on one, it fails on all.

    Parameters
    ----------
    doing
        What this is, in words.
    word
        Tells what must be the same with all owners.

    Raises
    ------
    RankError
        If it has failed with another owner, or the words differ.
    """
    try:
        yield
    except RankError:
        raise
    except BaseException as error:
        communicator.agree(doing, {"failure": f"{type(error).__name__}: {error}", "word": ""})
        raise
    if communicator.owner.is_alone:
        return
    said = [dict(word) for word in communicator.agree(doing, {"failure": "", "word": word()}) if isinstance(word, dict)]
    for index, each in enumerate(said):
        if each["failure"]:
            raise RankError(f"rank {index} failed in {doing}, so that nothing was changed on any: {each['failure']}")
    if len({str(each["word"]) for each in said}) > 1:
        different = "; ".join(f"rank {index}: {each['word']!s}" for index, each in enumerate(said))
        raise RankError(f"the ranks differ in {doing}, so that nothing was changed on any: {different}")


class Gathering:
    """A move to the part of a full copy that is at home here, beside the others' parts (a `Transfer`)."""

    def __init__(self, own: Transfer, others: Transfer) -> None:
        self._own = own
        self._others = others

    def wait(self) -> None:
        try:
            self._own.wait()
        finally:
            self._others.wait()  # it writes to the same memory

    def done(self) -> bool:
        return self._own.done() and self._others.done()

    def rest(self, seconds: float) -> None:
        self._own.rest(seconds)
        self._others.rest(seconds)
