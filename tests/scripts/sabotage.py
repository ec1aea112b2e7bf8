"""Breaks the product from outside, as a mistake in it would: scripts that prove something have to fail then.

``scripts/oom_regression --sabotage tests/scripts/sabotage.py:leak_a_full_copy``, or called by a test.
"""

import os
from typing import Any

import torch

_BROKEN = 1
"""The index of the chunk to which it happens."""


def leak_a_full_copy() -> None:
    """The memory of one chunk's full copy is not freed when it is evicted, though the ledger has it back."""
    from gemini.chunk import Tier
    from gemini.chunk.full_copies import FullCopies

    original, broken = FullCopies._free, dict[Any, Any]()

    def _free(self: Any, chunk: Any) -> None:
        # The first that comes: in some cases a chunk of a given index is never evicted.
        if broken.setdefault(self, chunk) is not chunk:
            original(self, chunk)
            return
        self._ledger.give(Tier.DEVICE, chunk.full_nbytes)
        self.nbytes -= chunk.full_nbytes
        self.resident.pop(chunk, None)

    FullCopies._free = _free  # type: ignore[method-assign]


def leak_a_chunk_for_good() -> None:
    """Once, memory as large as a full copy goes astray, and does not even go with the model."""
    from gemini.chunk.full_copies import FullCopies

    original, astray = FullCopies._free, list[torch.Tensor]()

    def _free(self: Any, chunk: Any) -> None:
        if not astray and chunk.full_nbytes > 1 << 20:
            astray.append(torch.ones(chunk.full_nbytes, dtype=torch.uint8))
        original(self, chunk)

    FullCopies._free = _free  # type: ignore[method-assign]


def enlarge_full_copies() -> None:
    """The ring of full copies takes 5 % more than the ledger says."""
    from gemini.chunk.memory import RamBackend

    grow, shrink, beyond = RamBackend.grow, RamBackend.shrink, dict[int, torch.Tensor]()

    def grow_more(self: Any, full: torch.Tensor) -> None:
        grow(self, full)
        beyond[id(full)] = torch.ones(full.numel() * full.element_size() // 20, dtype=torch.uint8)

    def shrink_more(self: Any, full: torch.Tensor) -> None:
        shrink(self, full)
        beyond.pop(id(full), None)

    RamBackend.grow, RamBackend.shrink = grow_more, shrink_more  # type: ignore[method-assign]


def forget_to_unpin() -> None:
    """One chunk is pinned when a unit enters, and not unpinned when it leaves."""
    from gemini.chunk import Chunk

    original = Chunk.unpin

    def unpin(self: Any) -> None:
        if self.index != _BROKEN or self.pins > 1:
            original(self)

    Chunk.unpin = unpin  # type: ignore[method-assign]


def drop_syncs_of_files() -> None:
    """What is written into a checkpoint's files is not forced to the disk."""
    _drop("gemini.checkpoint.output")


def drop_syncs_of_folders() -> None:
    """The names in a checkpoint's folder are not forced to the disk."""
    _drop("gemini.checkpoint.folder")


def _drop(name: str) -> None:
    import importlib

    module: Any = importlib.import_module(name)

    class _Os:
        """`os`, as this module sees it."""

        @staticmethod
        def fsync(fd: int) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    module.os = _Os()
