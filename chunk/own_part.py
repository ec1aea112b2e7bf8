"""What is at home here of the values of a parameter, whatever other owners have of them: read and replaced alone.

Reading asks nothing of the other owners. Replacing is done by all of them, each its part, in one change that they have
agreed upon (`Together.changing`).
"""

from torch import Tensor

from .chunk import Chunk
from .edits import has_to_stay, is_ahead, own_with_edits
from .extent import Place
from .manager import ChunkManager
from .names import MASTER
from .values import read_own, write_part


def own_place(manager: ChunkManager, parameter: Tensor, name: str) -> Place:
    """Where the masters (``"master"``) or one state of a parameter are."""
    chunk, position = _find(manager, parameter)
    return chunk.place(position, name)


def read_own_part(manager: ChunkManager, parameter: Tensor, name: str) -> Tensor:
    """A copy, on CPU, of what is at home here of the masters or a state (flat; waits for a pending update)."""
    manager.origin.refuse_elsewhere()
    chunk, position = _find(manager, parameter)
    manager.quiet(chunk)
    values = read_own(chunk, position, name)
    return own_with_edits(chunk, position, values) if name == MASTER and is_ahead(chunk) else values


def can_write_own_part(manager: ChunkManager, parameter: Tensor) -> bool:
    """False if the full copy of a parameter has to stay, and hence to follow: it needs whole values."""
    chunk, _ = _find(manager, parameter)
    manager.quiet(chunk)
    return chunk.full_is_home or not has_to_stay(chunk)


def write_own_part(manager: ChunkManager, parameter: Tensor, name: str, values: Tensor) -> None:
    """Replace what is at home here of the masters or a state (flat, on CPU); a full copy is dropped.

    All owners are in a change that they have agreed upon. Not where `can_write_own_part` says no.
    """
    manager.origin.refuse_elsewhere()
    chunk, position = _find(manager, parameter)
    chunk.settle()
    manager.full_copies.take_assigned(chunk)
    if name == MASTER and chunk.is_resident:
        manager.full_copies.bring_home(chunk)
        manager.evict(chunk)
    place = chunk.place(position, name)
    write_part(chunk, name, place.index, values.to(chunk.codecs[name].dtype))
    if name == MASTER:
        chunk.accept(position)


def _find(manager: ChunkManager, parameter: Tensor) -> tuple[Chunk, int]:
    place = manager.find(parameter)
    assert place is not None
    return place
