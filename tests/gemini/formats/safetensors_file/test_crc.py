"""The CRC-32 of parts put together."""

import random
import zlib

import pytest

from gemini.formats.safetensors_file import combined


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_make_the_checksum_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    parts = [rng.randbytes(rng.choice((0, 1, 7, 255, 4096, 70_000))) for _ in range(6)]
    crc = 0
    for part in parts:
        crc = combined(crc, zlib.crc32(part), len(part))
    assert crc == zlib.crc32(b"".join(parts))
