"""Reading boxes: which parts of what is stored make them up, and when all of a piece has come."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gemini.errors import CheckpointError

from .boxes import Box
from .pieces import Piece


class _Arriving:
    """A piece that is being read; it is written when it is whole."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self._left = piece.numel
        """Elements to come."""
        self._flat: Tensor | None = None
        """What has come."""

    def target(self, box: Box) -> Tensor:
        """Where a box goes."""
        if self._flat is None:
            self._flat = torch.empty(self.piece.numel, dtype=self.piece.dtype, device="cpu")
        return self.piece.view(self._flat, box)

    def arrived(self, numel: int) -> None:
        """Another part, of this many elements, is in its place."""
        self._left -= numel
        if not self._left and self._flat is not None:
            flat, self._flat = self._flat, None
            self.piece.write(flat)


class Arrivals:
    """Takes in the boxes of pieces, in any order, and has each piece written when it is whole."""

    def __init__(self) -> None:
        self._places: dict[MetadataIndex, tuple[_Arriving, Box]] = {}

    def plan(self, name: str, stored: TensorStorageMetadata, piece: Piece) -> list[ReadItem]:
        """What to read for a piece from a stored tensor, which has its shape.

        Raises
        ------
        CheckpointError
            If the stored parts do not cover it, each element once.
        """
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in piece.boxes]
        arriving = _Arriving(piece)
        for box in piece.boxes:
            self._places[MetadataIndex(name, box.offsets)] = arriving, box
        items = create_read_items_for_chunk_list(name, stored, chunks)
        if sum(prod(item.lengths) for item in items) != piece.numel or any(map(_overlap, *_pairs(items))):
            raise CheckpointError(f"the stored parts of {name} do not make up the tensor")
        return items

    def expects(self, item: ReadItem) -> bool:
        """True if an item was planned here."""
        return item.dest_index in self._places

    def target(self, item: ReadItem) -> Tensor:
        """Where to put what is read for an item."""
        arriving, box = self._places[item.dest_index]
        target = arriving.target(box)
        for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def arrived(self, item: ReadItem) -> None:
        """What was read for an item is in its place."""
        arriving, _ = self._places[item.dest_index]
        arriving.arrived(prod(item.lengths))


def read_object(name: str) -> ReadItem:
    """How to read what is no tensor."""
    nothing, index = torch.Size((0,)), MetadataIndex(name)
    return ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)


def _pairs(items: Sequence[ReadItem]) -> tuple[list[ReadItem], list[ReadItem]]:
    """Items for the same box that might overlap: of those that begin one after the other in the first dimension."""
    found: list[tuple[ReadItem, ReadItem]] = []
    in_order = sorted(items, key=lambda item: (tuple(item.dest_index.offset or ()), tuple(item.dest_offsets)))
    for number, item in enumerate(in_order):
        for other in in_order[number + 1 :]:
            if other.dest_index != item.dest_index or not _meet(item, other, 0):
                break
            found.append((item, other))
    return [a for a, _ in found], [b for _, b in found]


def _meet(a: ReadItem, b: ReadItem, dim: int) -> bool:
    if not a.dest_offsets:
        return True
    first, second = a.dest_offsets[dim], b.dest_offsets[dim]
    return bool(first < second + b.lengths[dim] and second < first + a.lengths[dim])


def _overlap(a: ReadItem, b: ReadItem) -> bool:
    return all(_meet(a, b, dim) for dim in range(len(a.dest_offsets)))
