"""Values of one parameter where they are at home, in parts: they are read and replaced without a copy of the whole.

Opening them has the homes hold the truth; then any threads may use them, until something else happens to the model.
"""

from torch import Tensor

from .chunk import Chunk
from .disk_file import PAGE_BYTES
from .edits import is_ahead
from .manager import ChunkManager
from .names import MASTER
from .values import read_part, write_part


class SlotValues:
    """The masters, or one state, of a parameter, flat, in the order of its elements.

    Attributes
    ----------
    dtype
        Of the values.
    numel
        How many there are.
    memory
        The values themselves (flat), where RAM has them in this form and nothing else follows from them; else None.
    """

    def __init__(self, chunk: Chunk, position: int, name: str) -> None:
        codec, place = chunk.codecs[name], chunk.place(position, name)
        self._chunk = chunk
        self._name = name
        self._index = place.index
        self.dtype = codec.dtype
        self.numel = place.numel
        home = chunk.homes[codec.specs[0].name]
        is_plain = not codec.computes and home.dtype == codec.dtype
        self._in_ram = home.in_memory(place.index, place.index + self.numel) if is_plain else None
        self._on_disk = home if is_plain and self._in_ram is None else None
        self.memory = self._in_ram if len(codec.specs) == 1 else None

    def page_offset(self, start: int) -> int:
        """Where in a page the value at ``start`` should be that is written: the disk then takes it without a copy."""
        return (self._index + start) * self.dtype.itemsize % PAGE_BYTES if self._on_disk is not None else 0

    def read(self, start: int, numel: int, room: Tensor) -> Tensor:
        """Values from ``start`` on (flat, on CPU, not to be changed).

        Parameters
        ----------
        room
            Bytes, from the beginning of a page on: for the values and two pages more. They may be read into that.
        """
        index = self._index + start
        if self._in_ram is not None:
            return self._in_ram.narrow(0, start, numel)
        if self._on_disk is None:
            return read_part(self._chunk, self._name, index, numel)
        # Whole pages, which go around the page cache; what else is in them belongs to parameters nearby.
        in_page = PAGE_BYTES // self.dtype.itemsize
        first = index // in_page * in_page
        last = min(-(-(index + numel) // in_page) * in_page, self._on_disk.numel)
        pages = room[: (last - first) * self.dtype.itemsize].view(self.dtype)
        self._on_disk.read(first, pages)
        return pages.narrow(0, index - first, numel)

    def write(self, start: int, values: Tensor) -> None:
        """Replace values from ``start`` on (flat, on CPU, any dtype)."""
        write_part(self._chunk, self._name, self._index + start, values.to(self.dtype))


def open_values(manager: ChunkManager, parameter: Tensor, name: str) -> SlotValues | None:
    """The values for reading; waits for a pending update.

    None where they cannot be read by any thread: they lie on an accelerator or with other owners, or in another order
    than that of the elements.
    """
    chunk, position = _find(manager, parameter)
    manager.quiet(chunk)
    return SlotValues(chunk, position, name) if _is_at_hand(chunk, position, name) else None


def open_to_replace(manager: ChunkManager, parameter: Tensor, name: str) -> SlotValues | None:
    """The values, all of which are going to be replaced; a full copy is dropped.

    None as for `open_values`; also where the full copy has to stay, and would have to follow.
    """
    chunk, position = _find(manager, parameter)
    chunk.settle()
    manager.full_copies.take_assigned(chunk)
    if chunk.is_shared or not _is_at_hand(chunk, position, name):
        return None
    slot = chunk.layout.slots[position]
    chunk.homes.before_change(slot.offset, slot.stop)
    if name == MASTER and chunk.is_resident:
        manager.full_copies.bring_home(chunk)
        manager.evict(chunk)
        if chunk.is_resident and not chunk.full_is_home:
            return None
    return SlotValues(chunk, position, name)


def accept_replaced(manager: ChunkManager, parameter: Tensor, name: str) -> None:
    """Mark home and parameter as equal: values have been replaced."""
    if name == MASTER:
        chunk, position = _find(manager, parameter)
        chunk.accept(position)


def _find(manager: ChunkManager, parameter: Tensor) -> tuple[Chunk, int]:
    manager.origin.refuse_elsewhere()
    place = manager.find(parameter)
    assert place is not None
    return place


def _is_at_hand(chunk: Chunk, position: int, name: str) -> bool:
    place = chunk.place(position, name)
    homes = [chunk.homes[spec.name] for spec in chunk.codecs[name].specs]
    is_here = len(place.own) == place.numel and all(h.tensor is None or h.tensor.device.type == "cpu" for h in homes)
    return is_here and not is_ahead(chunk) and _is_in_order(place.shape, place.stride)


def _is_in_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """True if dense elements follow each other in memory as they do in a contiguous tensor."""
    due = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != due:
            return False
        due *= size
    return True
