"""`prepare_dataloader`: batches for each rank, which can be resumed in the middle of an epoch."""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from .rank_sampler import RankSampler


class RankDataLoader(DataLoader[Any]):
    """A ``DataLoader`` over a `RankSampler` that knows how far it is.

    ``state_dict`` counts what the training loop has been given, not what workers have read ahead. It is the same on all
    ranks and can be loaded with another number of ranks and another batch size.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # nobody needs torch's private iterators
        if not isinstance(self.sampler, RankSampler):  # a library has made a loader like this one, with its own sampler
            return super().__iter__()
        self.sampler.seek()
        return self._counted(super().__iter__(), self.sampler)

    def _counted(self, batches: Iterator[Any], sampler: RankSampler) -> Iterator[Any]:
        for batch in batches:
            sampler.batch_was_taken()
            yield batch
        sampler.epoch_was_taken()

    def state_dict(self) -> dict[str, int | bool]:
        """Where training is: ``epoch``, and ``taken``, the samples of it that all ranks together have been given.

        Random numbers that workers draw are not part of it: after a resume in the middle of an epoch they are others.
        """
        epoch, taken = self._rank_sampler().position()
        return {"epoch": epoch, "taken": taken, **self._kind()}

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Go on where ``state`` was taken, with the next iteration.

        Raises
        ------
        ValueError
            The state is that of another dataset, or of another order of its samples.
        """
        ours = self._kind()
        theirs = {name: state.get(name) for name in ours}
        if theirs != ours:
            raise ValueError(
                f"the state is that of a loader with {theirs}, and this one has {ours}, so that its samples come in "
                "another order; prepare the loader with the same dataset, shuffle and seed"
            )
        self._rank_sampler().go_to(state["epoch"], state["taken"])

    def _kind(self) -> dict[str, int | bool]:
        """What the order of samples depends on."""
        sampler = self._rank_sampler()
        return {"samples": len(sampler.dataset), "shuffle": sampler.shuffle, "seed": sampler.seed}  # type: ignore[arg-type]

    def _rank_sampler(self) -> RankSampler:
        if not isinstance(self.sampler, RankSampler):
            raise TypeError(
                f"a loader with a {type(self.sampler).__name__} does not know how far it is; take the state of the one "
                "that prepare_dataloader returned"
            )
        return self.sampler


def prepare_dataloader(
    dataset: Dataset[Any],
    batch_size: int | None,
    *,
    rank: int,
    world_size: int,
    shuffle: bool = False,
    seed: int = 1024,
    drop_last: bool = False,
    distributed_sampler_cls: Callable[..., Sampler[Any]] | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
    **options: Any,
) -> DataLoader[Any]:
    """See `GeminiPlugin.prepare_dataloader`."""
    options |= {"batch_size": batch_size, "drop_last": drop_last}
    options["worker_init_fn"] = partial(_seed_worker, rank, worker_init_fn)
    generator = torch.Generator().manual_seed(seed)
    is_stream = isinstance(dataset, IterableDataset)
    if is_stream and world_size > 1:
        raise ValueError(
            f"{type(dataset).__name__} is an IterableDataset, all of which each of {world_size} ranks would train on; "
            "let it yield the samples of its rank only, and make a torch.utils.data.DataLoader of it yourself"
        )
    if is_stream or "sampler" in options or "batch_sampler" in options:
        return DataLoader(dataset, shuffle=shuffle, generator=generator, **options)
    placed: dict[str, Any] = {"num_replicas": world_size, "rank": rank, "shuffle": shuffle, "seed": seed}
    if distributed_sampler_cls is not None:
        theirs = distributed_sampler_cls(dataset, **placed, drop_last=drop_last)
        return DataLoader(dataset, sampler=theirs, generator=generator, **options)
    sampler = RankSampler(dataset, **placed, drop_last=drop_last, batch_size=batch_size or 1)
    return RankDataLoader(dataset, sampler=sampler, generator=sampler.generator, **options)


def _seed_worker(rank: int, then: Callable[[int], None] | None, worker: int) -> None:
    """Called in a worker of a loader. Its seed is that of the loader's generator, plus the worker's number."""
    workers = info.num_workers if (info := get_worker_info()) is not None else 1
    seed = torch.initial_seed() + rank * workers
    torch.manual_seed(seed)
    random.seed(seed % 2**32)
    np.random.seed(seed % 2**32)
    if then is not None:
        then(worker)
