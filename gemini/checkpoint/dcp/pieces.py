"""What of a model and its optimizer is at home here, as `torch.distributed.checkpoint` names and describes it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gemini.chunk import MASTER, Chunk, can_write_own_part
from gemini.errors import CheckpointError
from gemini.nn.optimizer.managed import ManagedOptimizer
from gemini.step.kept_states import KeptStates
from gemini.step.managed_step import ChunkedStep
from gemini.step.saved_states import read_own_state, write_own_state
from gemini.updates.values import Values

from ...tensor_parallel import LocalPart
from ..names import Entry, entries, extra_states
from ..tensor_parallel import whole_shape
from .boxes import Box, boxes

Path = tuple[str | int, ...]
"""Where something is in the nested dict that a checkpoint stands for."""

MODEL, OPTIMIZER, OURS = "model", "optim", "gemini_memory"
"""First names of what is stored. `torch.distributed.checkpoint.state_dict.get_state_dict` has what is in the first two;
the last one is for what torch's optimizers do not have."""


@dataclass(frozen=True, slots=True)
class Seat:
    """What of all that ranks have together this one is to save."""

    is_first: bool = True
    """Also what every rank has."""
    is_first_of_row: bool = True
    """Also parameters that the ranks of a tensor-parallel group have alike."""
    is_first_replica: bool = True
    """Its extents: no rank before it keeps the same ones."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint, and the boxes of it that are here."""

    paths: tuple[Path, ...]
    """More than one where a parameter is tied."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    first: int
    """Where the first box starts."""
    is_saved_here: bool
    """False if another rank has the same, and writes it."""
    read: Callable[[], Tensor]
    """A copy of what the boxes have together (flat, on CPU)."""
    write: Callable[[Tensor], None]
    """Replaces that."""

    @property
    def names(self) -> list[str]:
        return [name_of(path) for path in self.paths]

    @property
    def numel(self) -> int:
        """Elements that are here."""
        return sum(box.numel for box in self.boxes)

    def view(self, flat: Tensor, box: Box) -> Tensor:
        """The box in a flat tensor of all boxes, with its sizes."""
        memory = flat.narrow(0, box.start - self.first, box.numel)
        shaped = memory.view([box.sizes[dim] for dim in box.order])
        return shaped.permute([box.order.index(dim) for dim in range(len(box.order))])

    @classmethod
    def whole(
        cls, path: Path, form: Tensor, seat: Seat, read: Callable[[], Tensor], write: Callable[[Tensor], None]
    ) -> "Piece":
        """A tensor of which every rank has all. ``form`` has its shape and dtype, and its values may be elsewhere."""
        shape = tuple(form.shape)
        return cls(
            (path,), shape, form.dtype, (_whole_box(shape),), 0, seat.is_first,
            lambda: read().detach().to("cpu").contiguous().view(-1), lambda flat: write(flat.view(shape)),
        )  # fmt: skip


def name_of(path: Path) -> str:
    """The name under which something is stored."""
    return ".".join(map(str, path))


class Contents:
    """Pieces and objects of a model and of its optimizer.

    Parameters
    ----------
    model
        Boosted, or plain.
    optimizer
        None: of the model alone.
    seat
        Of this rank.

    Raises
    ------
    TypeError
        If the optimizer is another one.
    CheckpointError
        If the optimizer has a parameter that the model has not, or an option that is not a plain value.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, seat: Seat) -> None:
        if optimizer is not None and not isinstance(optimizer, ManagedOptimizer):
            raise TypeError(f"expected a HybridAdam, or what booster.boost returned, got {type(optimizer).__name__}")
        self.model = model
        self.optimizer = optimizer
        self.seat = seat
        self.entries = entries(model)
        self._of_parameter = {id(entry.tensor): entry for entry in self.entries}
        step = getattr(optimizer, "_managed", None)
        self.step = step if isinstance(step, ChunkedStep) else None

    # -- the model

    def weights(self) -> list[Piece]:
        """Every parameter and persistent buffer."""
        return [_of_entry(entry, self.seat) for entry in self.entries]

    def extras(self) -> dict[Path, Any]:
        """What modules with ``get_extra_state`` have."""
        return {(MODEL, name): value for name, value in extra_states(self.model).items()}

    # -- the optimizer

    @property
    def scaler(self) -> Any:
        """The loss scale, where there is one."""
        return None if self.step is None else self.step.scaling.scaler

    def name(self, parameter: Tensor) -> str:
        """The name of a parameter in the model; of a tied one, the first."""
        return self.names(parameter)[0]

    def names(self, parameter: Tensor) -> list[str]:
        """All names of a parameter in the model."""
        entry = self._of_parameter.get(id(parameter))
        if entry is None:
            raise CheckpointError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that the model has not: its state "
                "would have no name. Save with save_optimizer, which counts parameters"
            )
        return list(entry.names)

    def states(self, parameter: Tensor) -> Iterator[Piece]:
        """The tensors in the state of a parameter."""
        assert self.optimizer is not None
        if self.step is not None and self.step.kept.keeps(parameter):
            for name in self.step.kept.names(parameter):
                yield self.state(parameter, name)
            return
        for name, value in self.optimizer.exported_state(parameter).items():
            if isinstance(value, Tensor):
                yield self._whole(self.path(parameter, name), value)

    def state(self, parameter: Tensor, name: str) -> Piece:
        """One entry of the state of a parameter that is kept in chunks, also before there is any."""
        assert self.optimizer is not None and self.step is not None
        kept, path, values = self.step.kept, self.path(parameter, name), self._of_parameter[id(parameter)].values
        assert values is not None
        if name not in self.state_names(parameter):
            return self._whole(path, kept.copy(parameter, name))
        read = partial(read_own_state, values, self.optimizer.rules.of(parameter), parameter, name)
        write = partial(_write_state, values, self.optimizer, kept, parameter, name)
        return _part(values, parameter, (path,), kept.form(parameter, name).dtype, self.seat, read, write)

    def state_names(self, parameter: Tensor) -> list[str]:
        """The states of which there is a value for each element of a parameter in chunks; none for others."""
        assert self.optimizer is not None
        if self.step is None or not self.step.kept.keeps(parameter):
            return []
        found = self.step.manager.find(parameter)
        assert found is not None
        return list(self.optimizer.rules.of(parameter).codecs(found[0].states))

    def path(self, parameter: Tensor, name: str) -> Path:
        """Where an entry of its state is."""
        return OPTIMIZER, "state", self.name(parameter), name

    def options(self) -> dict[Path, Any]:
        """The options of the groups, tensors among them, and the names of their parameters."""
        assert self.optimizer is not None
        found: dict[Path, Any] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            options = {**self.optimizer.saved_options(group), "params": [self.name(p) for p in group["params"]]}
            found |= {(OPTIMIZER, "param_groups", index, name): value for name, value in options.items()}
        return found

    def ours(self) -> dict[Path, Any]:
        """What state dicts of torch's optimizers do not have."""
        assert self.optimizer is not None
        scale = None if self.scaler is None else self.scaler.state_dict()
        return {(OURS,): {"version": 1, "optimizer": self.optimizer.rules.name, "loss_scaler": scale}}

    def _whole(self, path: Path, value: Tensor) -> Piece:
        return Piece.whole(path, value, self.seat, partial(_same, value), _refuse)

    # -- both

    def pieces(self) -> list[Piece]:
        """Every tensor."""
        found = self.weights()
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                found += [piece for parameter in group["params"] for piece in self.states(parameter)]
        tensors = [
            self._whole(path, value) for path, value in self._plain_values().items() if isinstance(value, Tensor)
        ]
        return [*found, *tensors]

    def objects(self) -> dict[Path, Any]:
        """Everything else."""
        return {path: value for path, value in self._plain_values().items() if not isinstance(value, Tensor)}

    def _plain_values(self) -> dict[Path, Any]:
        return {**self.extras(), **({} if self.optimizer is None else {**self.options(), **self.ours()})}


def _of_entry(entry: Entry, seat: Seat) -> Piece:
    paths = tuple((MODEL, name) for name in entry.names)
    values, parameter = entry.values, entry.tensor
    if values is None:
        return replace(Piece.whole(paths[0], parameter, seat, entry.read, entry.write), paths=paths)
    follows = not can_write_own_part(values.manager, parameter)
    read = partial(values.read_own, parameter, MASTER)
    write = partial(_write_whole if follows else _write_own, values, parameter)
    return _part(values, parameter, paths, entry.dtype, seat, read, write, wants_all=follows)


def _part(
    values: Values,
    parameter: Tensor,
    paths: tuple[Path, ...],
    dtype: torch.dtype,
    seat: Seat,
    read: Callable[[], Tensor],
    write: Callable[[Tensor], None],
    wants_all: bool = False,
) -> Piece:
    """What is at home here of values in the shape of a parameter; or all that this rank can have of it."""
    chunk, position = _found(values, parameter)
    place, shape = chunk.plan.place(position), whole_shape(parameter)
    if not prod(shape):
        return Piece(paths, shape, dtype, (_whole_box(shape),), 0, seat.is_first, read, write)
    part = range(place.numel) if wants_all else place.own
    cut = boxes(place.shape, place.stride, part)
    sharding = parameter.sharding if isinstance(parameter, LocalPart) else None
    if sharding is not None:
        offsets = sharding.offsets()
        cut = [replace(box, offsets=tuple(map(sum, zip(box.offsets, offsets, strict=True)))) for box in cut]
    is_alone = seat.is_first_of_row or (sharding is not None and sharding.is_sharded)
    return Piece(paths, shape, dtype, tuple(cut), part.start, seat.is_first_replica and is_alone, read, write)


def _found(values: Values, parameter: Tensor) -> tuple[Chunk, int]:
    found = values.manager.find(parameter)
    assert found is not None
    return found


def _whole_box(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape, 0, tuple(range(len(shape))))


def _write_own(values: Values, parameter: Tensor, flat: Tensor) -> None:
    values.write_own(parameter, MASTER, flat)


def _write_whole(values: Values, parameter: Tensor, flat: Tensor) -> None:
    slot = values.manager.slot(parameter)
    values.write(parameter, MASTER, flat.as_strided(slot.shape, slot.stride))


def _write_state(
    values: Values, optimizer: ManagedOptimizer, kept: KeptStates, parameter: Tensor, name: str, own: Tensor
) -> None:
    kept.shown.release(parameter)
    kept.shown.let_go(parameter, name)
    write_own_state(values, optimizer.rules.of(parameter), parameter, name, own)


def _same(value: Tensor) -> Tensor:
    return value


def _refuse(value: Tensor) -> None:
    raise AssertionError("who loads this puts it where it belongs")
