"""Headers within limits, and checksums of what they describe."""

import json
import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemini.formats.safetensors_file import TENSORS_LIMIT, Malformed, Unsealed, damaged, read_header, verify


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def write(path: Path, values: dict[str, bytes]) -> None:
    header = Unsealed(((name, "U8", (len(value),)) for name, value in values.items()), {"format": "pt"})
    path.write_bytes(header.sealed(map(zlib.crc32, values.values())) + b"".join(values.values()))


def header_of(path: Path, text: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def small_runs(monkeypatch) -> None:
    """Tensors that go over many runs and buffers."""
    monkeypatch.setattr(verify, "RUN_BYTES", 1000)
    monkeypatch.setattr(verify, "BUFFER_BYTES", 300)


def test_every_flipped_bit_is_found_and_its_tensor_named(tmp_path: Path, small_runs: None) -> None:
    rng = random.Random(0)
    sizes = (0, 1, 299, 300, 301, 0, 5000, 1, 1, 1, 1000, 0)
    values = {f"t{i}": rng.randbytes(size) for i, size in enumerate(sizes)}
    path = tmp_path / "x.safetensors"
    write(path, values)
    whole = path.read_bytes()
    with opened(path) as fd:
        header = read_header(fd)
        assert damaged(fd, header) == []
    for name, tensor in header.tensors.items():
        for at in {tensor.begin, tensor.end - 1} if tensor.end > tensor.begin else ():
            flipped = bytearray(whole)
            flipped[at] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with opened(path) as fd:
                assert damaged(fd, read_header(fd)) == [name]


def test_every_changed_byte_of_a_sealed_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": b"123", "b": b"456"})
    whole = path.read_bytes()
    for at in range(8 + int.from_bytes(whole[:8], "little")):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        with opened(path) as fd, pytest.raises(Malformed):
            read_header(fd)


def test_swapped_names_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": b"123", "b": b"456"})
    swapped = path.read_bytes().replace(b'"a":', b'"-":').replace(b'"b":', b'"a":').replace(b'"-":', b'"b":')
    path.write_bytes(swapped)
    with opened(path) as fd, pytest.raises(Malformed, match="not the one that its checksum is of"):
        read_header(fd)


def test_a_file_without_checksums_is_not_verified(tmp_path: Path) -> None:
    header_of(tmp_path / "x", json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode(), b"123")
    with opened(tmp_path / "x") as fd:
        header = read_header(fd)
        assert header.checksums is None
        assert damaged(fd, header) == []


def test_a_file_that_becomes_shorter_is_no_hang(tmp_path: Path, small_runs: None) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": bytes(20_000)})
    with opened(path) as fd:
        header = read_header(fd)
        os.truncate(path, 10_000)
        with pytest.raises(Malformed, match="became shorter"):
            damaged(fd, header)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{%s}" % b",".join(b'"%d":{}' % i for i in range(TENSORS_LIMIT + 2)), "tensors; 262144 are allowed"),
        (b'{"a":{"shape":[%s]}}' % (b"1," * 9 * TENSORS_LIMIT + b"1"), "commas; 2097152 are allowed"),
        (b'{"%s":{}}' % (b"a" * 10_000_000), "describes tensor 'aaa"),
        (b'{"a":%s}' % (b"9" * 10_000_000), "is not readable|makes no sense"),
    ],
    ids=["many tensors", "a long shape", "a long name", "a long number"],
)
def test_a_header_beyond_the_limits_is_refused_in_a_short_message(tmp_path: Path, text: bytes, message: str) -> None:
    header_of(tmp_path / "x", text)
    with opened(tmp_path / "x") as fd, pytest.raises(Malformed, match=message) as caught:
        read_header(fd)
    assert len(str(caught.value)) < 1000


def test_what_no_reader_accepts_is_not_written() -> None:
    with pytest.raises(ValueError, match="262145 tensors are too many"):
        Unsealed(((str(i), "U8", (0,)) for i in range(TENSORS_LIMIT + 1)), {})
