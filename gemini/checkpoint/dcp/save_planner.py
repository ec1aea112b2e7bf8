"""Planners for `torch.distributed.checkpoint`: which boxes each rank writes and reads, and where they come from and go.

::

    chunks of rank 0 |====|==|       boxes of each parameter, as many as its extents cut it into
    chunks of rank 1      |==|===|   together they are the whole tensor, which is all that a reader needs to know

The values that are at home here are written as they are, in the order of the parameters; a rank never has more in RAM
than what it keeps of one parameter. Reading is the same in the other direction, and takes any boxes.
"""

import io
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.optim import Optimizer

from ..ranks import Crew
from .boxes import Box
from .objects import stored_object
from .pieces import Contents, Path, Piece, Seat, name_of


class SavePlanner(DefaultSavePlanner):
    """Adds a model, and its optimizer, to what `torch.distributed.checkpoint.save` saves.

    ::

        planner = SavePlanner(model, optimizer)
        torch.distributed.checkpoint.save({"epoch": 3}, checkpoint_id=folder, planner=planner)

    Each rank writes what it has at home, and nothing is gathered. The names are those of
    `torch.distributed.checkpoint.state_dict.get_state_dict`: ``model.wte.weight``, ``optim.state.wte.weight.exp_avg``.

    Parameters
    ----------
    model
        Boosted, or plain where a single process trains it.
    optimizer
        What `Booster.boost` returned, or a `HybridAdam`; None: the model alone.
    stores_ties
        False: of a tied parameter only the first name gets values; who writes the metadata adds the others.

    Raises
    ------
    TypeError
        If the optimizer is another one.
    CheckpointError
        When it plans, if something cannot be written.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, *, stores_ties: bool = True) -> None:
        super().__init__()
        crew = Crew.of(model)
        seat = Seat(crew.is_first, crew.is_first_of_row, crew.is_first_replica)
        self._contents = Contents(model, optimizer, seat)
        self._stores_ties = stores_ties
        self._pieces: dict[str, tuple[Piece, dict[tuple[int, ...], Box]]] = {}
        self._objects: dict[str, bytes] = {}
        self._held: tuple[Piece, Tensor] | None = None
        """The piece whose boxes are being written, and its values."""

    def create_local_plan(self) -> SavePlan:
        """What of this rank is to be written."""
        plan = super().create_local_plan()
        contents, items = self._contents, []
        paths: dict[str, Path] = {}
        if contents.optimizer is not None:
            contents.optimizer.before_state_dict()
        for piece in contents.pieces():
            paths |= {name_of(path): path for path in piece.paths}
            if piece.is_saved_here:
                items += self._items(piece)
        for path, value in contents.objects().items():
            name = name_of(path)
            paths[name] = path
            if contents.seat.is_first:
                self._objects[name] = stored_object(name, value)
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
        if both := sorted(paths.keys() & (plan.planner_data or {}).keys()):
            raise ValueError(f"{both[0]} is given to save, and is in the model or the optimizer, too")
        return replace(plan, items=[*plan.items, *items], planner_data={**(plan.planner_data or {}), **paths})

    def _items(self, piece: Piece) -> list[WriteItem]:
        properties = TensorProperties(dtype=piece.dtype)
        names = piece.names if self._stores_ties else piece.names[:1]
        self._pieces |= {name: (piece, {box.offsets: box for box in piece.boxes}) for name in names}
        return [
            WriteItem(
                MetadataIndex(name, box.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)),
                    properties,
                    torch.Size(piece.shape),
                ),
            )
            for name in names
            for box in piece.boxes
        ]

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The values of one box, on CPU."""
        name, offset = write_item.index.fqn, write_item.index.offset
        if name in self._objects:
            return io.BytesIO(self._objects[name])
        if name not in self._pieces:
            return super().resolve_data(write_item)
        piece, boxes = self._pieces[name]
        if self._held is None or self._held[0] is not piece:
            self._held = None  # before the next is read
            self._held = piece, piece.read()
        return piece.view(self._held[1], boxes[tuple(offset or ())]).contiguous()

    def ties(self) -> dict[str, list[str]]:
        """The first name of each tied parameter, and its other names."""
        return {piece.names[0]: piece.names[1:] for piece in self._contents.weights() if len(piece.names) > 1}

    def finish(self) -> None:
        """Let the values go that were written last."""
        self._held = None
