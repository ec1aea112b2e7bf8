"""Which samples of an epoch a rank gets, in which order.

The samples of an epoch have one order, which follows from the seed and the number of the epoch. A process that trains
by itself takes its batches from it one after the other. Several ranks take the same batches in turn, so that together
they compute what this process computes when it accumulates as many batches as there are ranks::

    order        | 0 1 2 | 3 4 5 | 6 7 8 | 9 10 11 | 12 13 |          batches of 3
    one process    1st     2nd     3rd     4th       5th
    rank 0 of 2    1st             2nd               12
    rank 1 of 2            1st             2nd       13

What is too little for a batch on each rank is divided evenly. As in torch, the first samples of the order are repeated
where that does not come out even, or with ``drop_last`` the last ones are left out.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler, RandomSampler


class RankSampler(DistributedSampler[int]):
    """The samples of one rank.

    Each iteration is the next epoch, unless `set_epoch` names another one. An epoch has the order that it has in a
    plain ``DataLoader`` whose ``generator`` has been seeded with ``seed``.

    Parameters
    ----------
    dataset
        Has ``__len__`` and ``__getitem__``.
    num_replicas, rank
        Number of ranks, and which of them this is.
    batch_size
        Samples that a rank takes in turn.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        batch_size: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self.batch_size = batch_size
        self._orders = _Orders(dataset, shuffle, seed)
        self._begun_at: int | None = None  # where in the epoch its iteration began; None before that
        self._taken = 0  # samples of the epoch that all ranks together have been given since its beginning
        self._start = 0  # where the next iteration begins, in samples of all ranks
        self._epoch_of_start: int | None = None  # the epoch for which that holds; None: whichever comes next

    @property
    def generator(self) -> torch.Generator:
        """For the ``DataLoader``, which seeds its workers with it when an iteration begins."""
        return self._orders.generator

    def set_epoch(self, epoch: int) -> None:
        """The next iteration has the order of this epoch."""
        self.epoch, self._begun_at = epoch, None

    def set_start_index(self, start_index: int) -> None:
        """The next iteration begins in the middle of its epoch. Those after it are whole.

        Parameters
        ----------
        start_index
            Samples that this rank has had, a multiple of the batch size.

        Raises
        ------
        ValueError
            The rank's part of an epoch has fewer samples.
        """
        if not 0 <= start_index <= self._count(0):
            raise ValueError(f"start_index must be from 0 to {self._count(0)}, a rank's samples, got {start_index}")
        self._start, self._epoch_of_start = start_index * self.num_replicas, None

    def position(self) -> tuple[int, int]:
        """Epoch, and samples of it that all ranks together have been given."""
        if self._begun_at is None:
            return self.epoch, self._next_start(self.epoch)
        return self.epoch, min(self._taken, len(self.dataset))  # type: ignore[arg-type]

    def go_to(self, epoch: int, taken: int) -> None:
        """The next iteration begins at a `position`."""
        self.set_epoch(epoch)
        self._start, self._epoch_of_start = taken, epoch

    def seek(self) -> None:
        """Bring the generator to where that of a plain ``DataLoader`` is when the next epoch begins."""
        self._orders.seek(self._next_epoch())

    def batch_was_taken(self) -> None:
        """Each rank has been given another batch of the epoch."""
        self._taken += self.batch_size * self.num_replicas

    def epoch_was_taken(self) -> None:
        """Each rank has been given its last batch."""
        if self._begun_at is not None:  # else the training loop has already named another epoch
            self.set_epoch(self.epoch + 1)

    def __iter__(self) -> Iterator[int]:
        self.set_epoch(self._next_epoch())
        self._taken = self._begun_at = self._next_start(self.epoch)
        self._start, self._epoch_of_start = 0, None
        yield from self._mine(self._orders.of(self.epoch), self._begun_at)

    def __len__(self) -> int:
        """Samples in the iteration under way, or in the next one."""
        return self._count(self._begun_at if self._begun_at is not None else self._next_start(self.epoch))

    def _next_epoch(self) -> int:
        return self.epoch if self._begun_at is None else self.epoch + 1

    def _next_start(self, epoch: int) -> int:
        return self._start if self._epoch_of_start in (None, epoch) else 0

    def _mine(self, order: Sequence[int], start: int) -> Iterator[int]:
        size, ranks = self.batch_size, self.num_replicas
        whole = start + self._in_whole_batches(start)
        for first in range(start + self.rank * size, whole, size * ranks):
            yield from order[first : first + size]
        share = self._share_of_rest(start)
        rest = islice(chain(order[whole:], cycle(order)), self.rank * share, (self.rank + 1) * share)
        yield from rest

    def _count(self, start: int) -> int:
        return self._in_whole_batches(start) // self.num_replicas + self._share_of_rest(start)

    def _in_whole_batches(self, start: int) -> int:
        """Samples of all ranks for which each of them gets whole batches."""
        left, round_ = self._left(start), self.batch_size * self.num_replicas
        return left // round_ * round_

    def _share_of_rest(self, start: int) -> int:
        """Samples that each rank gets of those that are left after the whole batches."""
        rest = self._left(start) - self._in_whole_batches(start)
        return rest // self.num_replicas if self.drop_last else -(-rest // self.num_replicas)

    def _left(self, start: int) -> int:
        return max(0, len(self.dataset) - start)  # type: ignore[arg-type]


class _Orders:
    """The orders that a plain ``DataLoader`` with a seeded generator has, one epoch after the other."""

    def __init__(self, dataset: Dataset[Any], shuffle: bool, seed: int) -> None:
        self.generator = torch.Generator()
        self._dataset = dataset
        self._shuffle = shuffle
        self._seed = seed
        self._rewind()

    def of(self, epoch: int) -> Sequence[int]:
        self.seek(epoch)
        return self._draw()

    def seek(self, epoch: int) -> None:
        """Costs as much as drawing the orders that lie between the epochs."""
        if epoch < self._epoch:
            self._rewind()
        self.generator.set_state(self._state)
        while self._epoch < epoch:
            self._draw()

    def _rewind(self) -> None:
        self._epoch, self._state = 0, self.generator.manual_seed(self._seed).get_state()

    def _draw(self) -> Sequence[int]:
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)  # the loader's seed of its workers
        order: Sequence[int] = range(len(self._dataset))  # type: ignore[arg-type]
        if self._shuffle and order:
            order = list(RandomSampler(order, generator=self.generator))
        self._epoch, self._state = self._epoch + 1, self.generator.get_state()
        return order
