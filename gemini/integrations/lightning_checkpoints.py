"""Lightning's checkpoints, written one tensor at a time, each whole or not there; compared with checksums when read."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from torch import nn
from torch.optim import Optimizer

from gemini.boosted import boosted, is_boosted
from gemini.checkpoint import read_all, save_streamed, unread_optimizer_state, unread_state_dict, verify_streamed
from gemini.errors import CheckpointError

_STAGE = "lightning"


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes the file that Lightning's own would write, and reads such files, without having all tensors in RAM.

    A file appears by one rename when all of it is on the disk; an older one of its name stays until then. What is not
    in a local folder goes Lightning's way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(read_all(checkpoint), path, storage_options)
        else:
            save_streamed(checkpoint, Path(path), stage=_STAGE)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", **options: Any) -> dict[str, Any]:
        """Read a file; its tensors stay in it until they are used.

        Raises
        ------
        CheckpointError
            If it is damaged.
        """
        if not _is_local(path) or not Path(path).is_file() or not zipfile.is_zipfile(path):
            return super().load_checkpoint(path, map_location, **options)  # type: ignore[no-any-return]
        verify_streamed(Path(path))
        found: dict[str, Any] = torch.load(path, map_location=map_location, mmap=True, **options)
        return found


class Checkpoints:
    """The part of `GeminiStrategy` that saves and loads."""

    _checkpoint_io: Any
    lightning_module: Any
    managed_module: Any

    @property
    def checkpoint_io(self) -> CheckpointIO:
        if self._checkpoint_io is None:
            self._checkpoint_io = StreamedCheckpointIO()
        return super().checkpoint_io  # type: ignore[misc]

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: values are read straight into chunks, which are there after it."""
        return True

    def lightning_module_state_dict(self) -> Mapping[str, Any]:
        module: nn.Module = self.lightning_module
        try:
            return unread_state_dict(module)
        except CheckpointError:  # the user's state_dict() has something of its own
            found: Mapping[str, Any] = module.state_dict()
            return found

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        managed = boosted(self.managed_module).optimizer if is_boosted(self.managed_module) else None
        given: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        return unread_optimizer_state(given if managed is None else managed)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if not isinstance(self.checkpoint_io, StreamedCheckpointIO):  # the user's, which may write it later
            checkpoint = read_all(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)  # type: ignore[misc]


def _is_local(path: Any) -> bool:
    return "://" not in str(path)
