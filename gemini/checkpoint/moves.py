"""Moves runs of blocks between a file and where the values are, and sums what the file has."""

import os
import zlib

from torch import Tensor

from gemini.tensor_file import Malformed, Sums

from .blocks import Block, BlockMemory, Part
from .output import Output
from .raw import bytes_of


def write_run(out: Output, run: list[Block], sums: Sums, memory: BlockMemory) -> int:
    """Write values, rounded to the file's dtype; returns how many bytes these are.

    Straight from the memory of the values where that has them as the file does.
    """
    for block in run:
        begin = block[0].begin
        if len(block) == 1 and (own := block[0].memory) is not None:
            data = bytes_of(own)
        else:
            filed = memory.filed(block[-1].end - begin, _offset(block))
            for part in block:
                _read_values(part, filed.narrow(0, part.begin - begin, part.end - part.begin).view(part.dtype), memory)
            data = bytes_of(filed)
        for part in block:
            _sum(part, data[part.begin - begin : part.end - begin], sums)
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
        if len(block) == 1 and (own := block[0].memory) is not None:
            data = bytes_of(own)
            fill(fd, data, begin)
            _sum(block[0], data, sums)
            continue
        filed = memory.filed(block[-1].end - begin, _offset(block))
        data = bytes_of(filed)
        fill(fd, data, begin)
        for part in block:
            _sum(part, data[part.begin - begin : part.end - begin], sums)
            stored = filed.narrow(0, part.begin - begin, part.end - part.begin)
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


def _offset(block: Block) -> int:
    """Where in a page a block begins: only large parts, which have a block to themselves, have a wish."""
    part = block[0]
    is_kept_so = len(block) == 1 and part.values.dtype == part.dtype
    return part.values.offset_in_page(part.start) if is_kept_so else 0


def _read_values(part: Part, filed: Tensor, memory: BlockMemory) -> None:
    numel = part.stop - part.start
    if part.values.dtype == part.dtype:
        part.values.read(part.start, filed)
    elif (own := part.values.memory) is not None:
        filed.copy_(own.narrow(0, part.start, numel))
    else:
        kept = memory.kept(numel, part.values.dtype, part.values.offset_in_page(part.start))
        part.values.read(part.start, kept)
        filed.copy_(kept)


def _sum(part: Part, data: memoryview, sums: Sums) -> None:
    sums.add(part.begin, part.index, zlib.crc32(data), len(data))
