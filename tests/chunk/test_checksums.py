"""A disk that gives back other bytes than were written is found out, whichever part of them is read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemini.chunk import DiskBackend, Ledger, MemoryMap, Tier
from gemini.errors import OffloadError

NUMEL = 1000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskBackend]:
    backend = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED), checksums=True)
    yield backend
    backend.close()


def flip(disk: DiskBackend, byte: int) -> None:
    """What a bad disk does."""
    (old,) = os.pread(disk.file._fd, 1, byte)
    os.pwrite(disk.file._fd, bytes([old ^ 1]), byte)


def test_what_was_written_in_any_pieces_is_read_in_any_pieces(disk: DiskBackend) -> None:
    buffer, expected = disk.allocate(NUMEL, torch.float32, "x"), torch.zeros(NUMEL)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        start, stop = sorted(torch.randint(0, NUMEL + 1, (2,), generator=generator).tolist())
        expected[start:stop] = torch.randn(stop - start, generator=generator)
        buffer.write(start, expected[start:stop])
        start, stop = sorted(torch.randint(0, NUMEL + 1, (2,), generator=generator).tolist())
        out = torch.empty(stop - start)
        buffer.read(start, out)
        assert torch.equal(out, expected[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, NUMEL), (400, 600), (500, 501), (450, 500), (0, 501)])
def test_a_flipped_bit_is_an_error_that_names_the_chunk_as_far_as_its_piece_is_read(
    disk: DiskBackend, start: int, stop: int
) -> None:
    disk.allocate(3, torch.float32, "a neighbour")
    buffer = disk.allocate(NUMEL, torch.float32, "exp_avg of chunk 3 (with h.1.mlp)")
    buffer.write(400, torch.randn(200))
    flip(disk, 4096 + 500 * 4)
    with pytest.raises(OffloadError, match=r"1600 to 2400 of exp_avg of chunk 3 \(with h.1.mlp\) are not what was"):
        buffer.read(start, torch.empty(stop - start))
    with pytest.raises(OffloadError, match="Set offload_dir to another disk"):
        buffer.read(start, torch.empty(stop - start))
    buffer.read(0, torch.empty(400))
    buffer.read(600, torch.empty(400))
    buffer.write(400, torch.zeros(200))
    buffer.read(start, torch.empty(stop - start))


def test_a_flipped_bit_is_found_in_a_write_that_began_within_a_piece(
    disk: DiskBackend,
) -> None:
    buffer = disk.allocate(NUMEL, torch.float32, "x")
    buffer.write(0, torch.randn(NUMEL))
    buffer.write(100, torch.randn(100))
    flip(disk, 150 * 4)
    with pytest.raises(OffloadError, match="bytes 400 to 800 of x"):
        buffer.read(0, torch.empty(NUMEL))


def test_after_a_write_that_failed_the_old_checksum_does_not_speak(
    disk: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = disk.allocate(NUMEL, torch.float32, "x")
    buffer.write(0, torch.randn(NUMEL))
    write = os.pwritev

    def half(fd: int, buffers: list[memoryview], offset: int) -> int:
        write(fd, [buffers[0][:100]], offset)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", half)
        with pytest.raises(OffloadError, match="Input/output error"):
            buffer.write(0, torch.ones(NUMEL))
    buffer.read(0, torch.empty(NUMEL))
    buffer.write(0, torch.ones(NUMEL))
    flip(disk, 0)
    with pytest.raises(OffloadError, match="are not what was written"):
        buffer.read(0, torch.empty(NUMEL))


def test_without_being_asked_for_nothing_is_compared(tmp_path: Path) -> None:
    disk = DiskBackend(tmp_path, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    buffer = disk.allocate(NUMEL, torch.float32, "x")
    buffer.write(0, torch.ones(NUMEL))
    flip(disk, 0)
    buffer.read(0, torch.empty(NUMEL))
    disk.close()


def test_the_rest_of_a_piece_may_be_written_while_a_part_of_it_is_read(
    disk: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by updates of neighbouring blocks: one is read while the one before it is written."""
    home = disk.allocate(4096, torch.float32, "master of chunk 0")
    home.write(0, torch.zeros(4096))
    read, calls = disk.file.read, []

    def and_write(*arguments: Any) -> None:
        read(*arguments)
        calls.append(arguments)
        if len(calls) == 2:  # the whole piece, to be compared
            home.write(0, torch.ones(2048))

    monkeypatch.setattr(disk.file, "read", and_write)
    out = torch.empty(2048)
    home.read(2048, out)
    assert len(calls) == 2 and torch.equal(out, torch.zeros(2048))
    home.read(0, out)
    assert torch.equal(out, torch.ones(2048))
