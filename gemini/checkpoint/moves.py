"""Moves runs of blocks between a file and where the values are, and sums what the file has."""

import mmap
import os
import zlib

from torch import Tensor

from gemini.formats.safetensors_file import Malformed, Sums

from .blocks import BLOCK_BYTES, Block, BlockMemory, Part
from .output import Output
from .raw import bytes_of, overflows


def write_run(out: Output, run: list[Block], sums: Sums, memory: BlockMemory) -> int:
    """Write values, rounded to the file's dtype; returns how many bytes these are.

    Each is copied once, into the block: from there it goes around the page cache, where the file system can do that.

    Raises
    ------
    OverflowError
        If finite values have no place in the file's dtype: with the index of their tensor.
    """
    for block in run:
        begin = block[0].begin
        filed = memory.filed(block[-1].end - begin, begin % mmap.PAGESIZE)
        data = bytes_of(filed)
        for part in block:
            place = slice(part.begin - begin, part.end - begin)
            _gather(part, filed[place].view(part.dtype), memory.room)
            sums.add(part.begin, part.index, zlib.crc32(data[place]), len(data[place]))
        out.write_at(begin, data)
    begin, end = run[0][0].begin, run[-1][-1].end
    out.begin_writeback(begin, end - begin)
    return end - begin


def read_run(fd: int, run: list[Block], sums: Sums, memory: BlockMemory) -> int:
    """Replace values with what the file has; returns how many bytes these are.

    Straight into the memory of the values where that is to have them as the file does.

    Raises
    ------
    Malformed
        If the file ends too early.
    """
    for block in run:
        begin = block[0].begin
        if len(block) == 1 and (own := _own_memory(block[0])) is not None:
            fill(fd, bytes_of(own), begin)
            sums.add(begin, block[0].index, zlib.crc32(bytes_of(own)), own.nbytes)
            continue
        filed = memory.filed(block[-1].end - begin, block[0].page_offset)
        data = bytes_of(filed)
        fill(fd, data, begin)
        for part in block:
            place = slice(part.begin - begin, part.end - begin)
            sums.add(part.begin, part.index, zlib.crc32(data[place]), len(data[place]))
            stored = filed[place]
            if stored.storage_offset() % part.dtype.itemsize:
                stored = stored.clone()  # files of others may have tensors anywhere
            part.values.write(part.start, stored.view(part.dtype))
    return run[-1][-1].end - run[0][0].begin


def fill(fd: int, out: memoryview, begin: int) -> None:
    """Read exactly these bytes of a file."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], begin + done)
        if not count:
            raise Malformed("it became shorter while it was read")
        done += count


def _gather(part: Part, out: Tensor, room: Tensor) -> None:
    step = BLOCK_BYTES // part.values.dtype.itemsize
    for start in range(part.start, part.stop, step):
        numel = min(step, part.stop - start)
        values, filed = part.values.read(start, numel, room), out.narrow(0, start - part.start, numel)
        filed.copy_(values)
        if overflows(filed, values):
            raise OverflowError(part.index)


def _own_memory(part: Part) -> Tensor | None:
    memory = part.values.memory
    return memory.narrow(0, part.start, part.stop - part.start) if memory is not None and part.is_kept_so else None
