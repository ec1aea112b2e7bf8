"""`DPPluginBase`: a plugin whose ranks train on different data. ColossalAI's scripts annotate theirs with it."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from gemini.arguments.checked import checked
from gemini.booster.arguments import PREPARE_DATALOADER
from gemini.booster.dataloader import prepare_dataloader
from gemini.colossal.plugin import Plugin

__all__ = ["DPPluginBase"]


class DPPluginBase(Plugin):
    """Gives each rank its batches."""

    @checked(PREPARE_DATALOADER)
    def prepare_dataloader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 1024,
        drop_last: bool = False,
        pin_memory: bool = False,
        num_workers: int = 0,
        distributed_sampler_cls: Callable[..., Sampler[Any]] | None = None,
        **kwargs: Any,
    ) -> DataLoader[Any]:
        """A ``DataLoader`` with this rank's batches, in an order that depends on ``seed`` and epoch alone.

        One rank gets the batches of a plain ``DataLoader`` whose generator has this seed. Several ranks get the same
        ones in turn: the first batches of all ranks are the first ones of a single rank. Each sample comes once in an
        epoch; what is too little for a batch on each rank is divided evenly, with a few samples repeated.

        Each iteration is another epoch; ``loader.sampler.set_epoch(epoch)`` names one. To resume in the middle of an
        epoch use ``loader.state_dict()`` and ``load_state_dict()``, which work with another number of ranks too, or
        ``loader.sampler.set_start_index(samples of this rank)``.

        Parameters
        ----------
        batch_size
            Samples that each rank gets at once.
        drop_last
            Leave out what is too little for a batch on each rank.
        distributed_sampler_cls
            Called as ``distributed_sampler_cls(dataset, num_replicas=, rank=, shuffle=, seed=, drop_last=)`` instead.
        num_workers
            Processes that load. Their random generators differ between workers and ranks.
        kwargs
            Further arguments of ``DataLoader``. A ``sampler`` or ``batch_sampler`` given here is used as it is.

        Raises
        ------
        ValueError
            Several ranks would each get all of an ``IterableDataset``.
        """
        is_single = not dist.is_initialized()
        return prepare_dataloader(
            dataset,
            batch_size,
            rank=0 if is_single else dist.get_rank(self.process_group),
            world_size=1 if is_single else dist.get_world_size(self.process_group),
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            pin_memory=pin_memory,
            num_workers=num_workers,
            distributed_sampler_cls=distributed_sampler_cls,
            **kwargs,
        )
