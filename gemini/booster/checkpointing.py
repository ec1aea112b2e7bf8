"""`Checkpointing`: the methods of `Booster` that save and load."""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gemini.arguments.checked import checked
from gemini.boosting.alive import managers

from .arguments import (
    LOAD,
    LOAD_MODEL,
    LOAD_OPTIMIZER,
    LR_SCHEDULER,
    SAVE,
    SAVE_LORA,
    SAVE_MODEL,
    SAVE_OPTIMIZER,
)


class Checkpointing:
    """Saves and loads a training run, as a whole or in parts."""

    @checked(SAVE)
    def save(
        self,
        folder: str | Path,
        *,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        dataloader: Any = None,
        extra: Any = None,
        keep: int | None = 3,
        size_per_shard: int | str = "5GB",
        use_async: bool = False,
        layout: str = "hf",
    ) -> Path:
        """Save all that a training run consists of as one checkpoint: all of it is there afterwards, or nothing.

        It is written beside the older ones, forced to the disk with checksums, and gets its name, the next of
        ``checkpoint-000001, ...``, by one rename. A crash, a full disk or a power failure at any moment leaves the
        older ones as they were. The states of all random number generators of this process are part of it.

        Parameters
        ----------
        folder
            Of the checkpoints of this run; made if it does not exist.
        model, optimizer, lr_scheduler, dataloader
            Boosted or plain; of several, a dict from names to them. A dataloader has ``state_dict`` and
            ``load_state_dict``: that of ``plugin.prepare_dataloader``, or torchdata's ``StatefulDataLoader``.
        extra
            Anything else that `load` is to return: tensors, plain values, and containers of them.
        keep
            How many checkpoints stay, this one included; the oldest ones go when it is on the disk. None: all.
        size_per_shard
            Of files of tensors, at most: MiB as a number, or ``"5GB"``.
        use_async
            Return at once, and write what there is now while training goes on. See `wait_until_finished`.
        layout
            Of models and optimizers: ``"hf"`` is Hugging Face's, with whole tensors; ``"dcp"`` is that of
            `torch.distributed.checkpoint`, for which each rank writes what it has at home and nothing is gathered. Not
            written in the background. `load` finds out.

        Returns
        -------
        Path
            The checkpoint, whose model ``from_pretrained`` of transformers reads, as does `load_model`. Where it is
            still being written it has no name yet: ``folder``, from which `load` takes the newest one.

        Raises
        ------
        CheckpointError
            If it cannot be written.
        """
        from gemini import checkpoint as io

        parts = io.given_parts(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, dataloader=dataloader)
        return io.save_checkpoint(
            folder,
            parts,
            extra=extra,
            keep=keep,
            size_per_shard=size_per_shard,
            use_async=use_async,
            layout=layout,
        )

    def wait_until_finished(self) -> None:
        """Return when everything that is being saved with ``use_async=True`` in this process is on the disk.

        The next save or load of the same model waits as well, and so does the end of the process.

        Raises
        ------
        CheckpointError
            If one could not be written. The checkpoint that was there before is as it was.
        """
        for manager in managers():
            manager.snapshots.wait()

    @checked(LOAD)
    def load(
        self,
        folder: str | Path,
        *,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        dataloader: Any = None,
        extra: MutableMapping[str, Any] | None = None,
        strict: bool = True,
        verify: bool = True,
        rng: bool = True,
    ) -> Any:
        """Load a checkpoint that `save` wrote, at any number of ranks, chunk size, placement and precision.

        Everything is checked before anything changes. Parts that are not given are not loaded.

        Parameters
        ----------
        folder
            Of the checkpoints (the newest one is loaded), or one of them.
        model, optimizer, lr_scheduler, dataloader
            Built as those that were saved; dicts with the same names.
        extra
            A dict, updated with what was given to `save` as ``extra``, if that was a dict. It comes back in any case.
        strict
            Whether parts that the checkpoint does not have, and missing and unexpected tensors, are an error.
        verify
            Whether checksums are compared.
        rng
            Whether the random number generators of this process continue as those of the rank that saved. A rank that
            was not there then keeps its own.

        Returns
        -------
        Any
            What was given to `save` as ``extra``.

        Raises
        ------
        CheckpointError
            If there is no checkpoint, it is damaged or does not fit; nothing has been changed then. An older one is
            never taken in the place of a damaged one: the message says which one is whole.
        """
        from gemini import checkpoint as io

        parts = io.given_parts(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, dataloader=dataloader)
        found = io.load_checkpoint(folder, parts, strict=strict, verify=verify, rng=rng)
        if extra is not None and isinstance(found, Mapping):
            extra.update(found)
        return found

    @checked(SAVE_MODEL)
    def save_model(
        self,
        model: nn.Module,
        checkpoint: str,
        shard: bool = False,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_safetensors: bool = True,
        use_async: bool = False,
        *,
        gather_dtensor: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the model in the Hugging Face layout; see `gemini.checkpoint.save_model`. Tensors are whole always."""
        from gemini import checkpoint as io

        io.save_model(
            model,
            checkpoint,
            shard=shard,
            prefix=prefix,
            size_per_shard=size_per_shard,
            use_safetensors=use_safetensors,
            use_async=use_async,
            dtype=dtype,
        )

    @checked(LOAD_MODEL)
    def load_model(
        self,
        model: nn.Module,
        checkpoint: str,
        strict: bool = True,
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
        *,
        verify: bool = True,
    ) -> Any:
        """Read a Hugging Face folder, a safetensors file or a torch file; see `gemini.checkpoint.load_model`.

        Returns ``missing_keys`` and ``unexpected_keys``, as ``load_state_dict``.

        ``low_cpu_mem_mode`` and ``num_threads`` are accepted: one tensor at a time is in memory always.
        """
        from gemini import checkpoint as io

        return io.load_model(model, checkpoint, strict=strict, verify=verify)

    @checked(SAVE_OPTIMIZER)
    def save_optimizer(
        self,
        optimizer: Optimizer,
        checkpoint: str,
        shard: bool = False,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_async: bool = False,
        *,
        gather_dtensor: bool = True,
    ) -> None:
        """Write states, groups and loss scale; see `gemini.checkpoint.save_optimizer`.

        ``gather_dtensor`` is accepted: tensors are whole always.
        """
        from gemini import checkpoint as io

        io.save_optimizer(
            optimizer, checkpoint, shard=shard, prefix=prefix, size_per_shard=size_per_shard, use_async=use_async
        )

    @checked(LOAD_OPTIMIZER)
    def load_optimizer(
        self,
        optimizer: Optimizer,
        checkpoint: str,
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
        *,
        strict: bool = True,
        verify: bool = True,
    ) -> None:
        """Read what `save_optimizer` wrote; see `gemini.checkpoint.load_optimizer`, and `load_model` for the rest."""
        from gemini import checkpoint as io

        io.load_optimizer(optimizer, checkpoint, strict=strict, verify=verify)

    @checked(LR_SCHEDULER)
    def save_lr_scheduler(self, lr_scheduler: LRScheduler, checkpoint: str) -> None:
        """Write a scheduler's state."""
        from gemini import checkpoint as io

        io.save_lr_scheduler(lr_scheduler, checkpoint)

    @checked(LR_SCHEDULER)
    def load_lr_scheduler(self, lr_scheduler: LRScheduler, checkpoint: str) -> None:
        """Read what `save_lr_scheduler` wrote."""
        from gemini import checkpoint as io

        io.load_lr_scheduler(lr_scheduler, checkpoint)

    @checked(SAVE_LORA)
    def save_lora_as_pretrained(self, model: nn.Module, checkpoint: str, use_safetensors: bool = False) -> None:
        """Write the adapters of `enable_lora` alone; see `gemini.checkpoint.save_lora`."""
        from gemini import checkpoint as io

        io.save_lora(model, checkpoint, use_safetensors=use_safetensors)
