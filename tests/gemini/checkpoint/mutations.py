"""Ways in which a file of a checkpoint may be damaged, by accident or on purpose."""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from gemini.formats.json_file import CHECKSUM, checksum_of

Mutation = Callable[[random.Random, bytes, bytes], bytes]
"""From random numbers, a file, and the same file of another checkpoint."""

PAYLOAD = b"cos\nsystem\nX\x0e\x00\x00\x00touch executed\x85R0"
"""A pickle's opcodes that run a command, and take its result away again."""
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, -(2**63), 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "é" * 50,
    "x" * 100_000, [], {}, [None], [[[[[]]]]], {"a": {"b": []}}, "../x", "/dev/zero", "\0",
)  # fmt: skip
DEEP = "[" * 100_000 + "]" * 100_000


# -- bytes of any file


def flipped_bits(rng: random.Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_near_the_ends(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Where headers and directories are."""
    changed = bytearray(data)
    at = rng.randrange(min(400, len(data)))
    changed[at if rng.random() < 0.5 else len(data) - 1 - at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_off(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.choice((0, 1, 8, len(data) - 1, rng.randrange(len(data))))]


def longer(rng: random.Random, data: bytes, other: bytes) -> bytes:
    tail = rng.choice((b"\0", b"\0" * 4096, rng.randbytes(100), data[-200:], data))
    return data + tail if rng.random() < 0.7 else tail + data


def swapped_blocks(rng: random.Random, data: bytes, other: bytes) -> bytes:
    size = min(rng.choice((4, 16, 64, 512)), len(data) // 2)
    first, second = sorted(rng.sample(range(len(data) - size + 1), 2))
    if second < first + size:
        return data[:first] + data[first + 1 :] + data[first : first + 1]
    return (
        data[:first] + data[second : second + size] + data[first + size : second] + data[first : first + size]
        + data[second + size :]
    )  # fmt: skip


def zeroed_block(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at, size = rng.randrange(len(data)), rng.choice((16, 512, 4096))
    return data[:at] + b"\0" * len(data[at : at + size]) + data[at + size :]


def of_another_checkpoint(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return other


def half_of_another_checkpoint(rng: random.Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + other[at:]


# -- JSON


def changed_value(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return _with_change(rng, data, lambda rng, holder, key: holder.__setitem__(key, rng.choice(ODD_VALUES)))


def removed_value(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return _with_change(rng, data, lambda rng, holder, key: holder.__delitem__(key))


def swapped_values(rng: random.Random, data: bytes, other: bytes) -> bytes:
    def swap(rng: random.Random, holder: Any, key: Any) -> None:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        another = rng.choice(keys)
        holder[key], holder[another] = holder[another], holder[key]

    return _with_change(rng, data, swap)


def name_twice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    text = data.decode()
    places = [i for i in range(len(text)) if text.startswith('":', i)]
    at = rng.choice(places)
    start = text.rfind('"', 0, at)
    return (text[:start] + text[start : at + 2] + " 1, " + text[start:]).encode()


def nested_deep(rng: random.Random, data: bytes, other: bytes) -> bytes:
    text = data.decode()
    at = rng.choice([i for i in range(len(text)) if text[i] == ":"])
    return (text[: at + 1] + DEEP + text[at + 1 :]).encode()


def resealed(mutation: Mutation) -> Mutation:
    """The same by somebody who knows of the checksum in the JSON."""

    def seal(rng: random.Random, data: bytes, other: bytes) -> bytes:
        content = json.loads(mutation(rng, data, other))
        if isinstance(content, dict) and CHECKSUM in content:
            content[CHECKSUM] = checksum_of(content)
        return json.dumps(content).encode()

    return seal


# -- safetensors


def in_header(mutation: Mutation) -> Mutation:
    """Changes the header, and takes out the checksums, as another program would write it."""

    def change(rng: random.Random, data: bytes, other: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] = {"format": "pt"}
        text = mutation(rng, json.dumps(header).encode(), other)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return change


# -- files of torch.save


def in_pickle(change: Callable[[random.Random, bytes], bytes]) -> Mutation:
    """Changes the pickle of names and shapes; all checksums are right."""

    def rewritten(rng: random.Random, data: bytes, other: bytes) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
            for name in old.namelist():
                record = old.read(name)
                new.writestr(name, change(rng, record) if name.endswith("/data.pkl") else record)
        return made.getvalue()

    return rewritten


def inserted_opcodes(rng: random.Random, text: bytes) -> bytes:
    at = rng.randrange(2, len(text))
    opcodes = b"".join(rng.choice((b"0", b"2", b"(", b"t", b"R", b"b", b"N", b"}", b"]", b"\x85", b"q\x01", b".", b"Q"))
                       for _ in range(rng.randint(1, 4)))  # fmt: skip
    return text[:at] + opcodes + text[at:]


def inserted_code(rng: random.Random, text: bytes) -> bytes:
    return text[:2] + PAYLOAD + text[2:]


def inserted_byte_array(rng: random.Random, text: bytes) -> bytes:
    return text[:2] + b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R0" + text[2:]


def other_bytes(rng: random.Random, text: bytes) -> bytes:
    changed = bytearray(text)
    changed[rng.randrange(2, len(text))] = rng.randrange(256)
    return bytes(changed)


def other_pickle(rng: random.Random, text: bytes) -> bytes:
    return pickle.dumps(rng.choice(([], 3, None, {}, {1: 2}, {"state": []}, "x" * 10, {"last_epoch": "x"})), protocol=2)


def bombs(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The same content compressed, or with records of 4 GiB that are stored in 4 MiB."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(old.namelist()[0].split("/")[0] + "/data/99", b"\0" * (1 << 22))
    return made.getvalue()


BYTES: dict[str, Mutation] = {
    "flipped bits": flipped_bits,
    "flipped bits near the ends": flipped_near_the_ends,
    "cut off": cut_off,
    "longer": longer,
    "swapped blocks": swapped_blocks,
    "zeros": zeroed_block,
    "of another checkpoint": of_another_checkpoint,
    "half of another checkpoint": half_of_another_checkpoint,
}
JSON: dict[str, Mutation] = {
    "another value": changed_value,
    "a value less": removed_value,
    "two values swapped": swapped_values,
    "a name twice": name_twice,
    "nested deep": nested_deep,
}
SEALED_JSON: dict[str, Mutation] = {
    f"{name}, sealed": resealed(JSON[name]) for name in ("another value", "a value less", "two values swapped")
}
HEADER: dict[str, Mutation] = {f"{name} in the header": in_header(mutation) for name, mutation in JSON.items()}
PICKLE: dict[str, Mutation] = {
    "opcodes": in_pickle(inserted_opcodes),
    "code": in_pickle(inserted_code),
    "a byte array of 8 GiB": in_pickle(inserted_byte_array),
    "another byte in the pickle": in_pickle(other_bytes),
    "another pickle": in_pickle(other_pickle),
    "a bomb": bombs,
}
SEALS = {*SEALED_JSON, *HEADER, *PICKLE}
"""Mutations after which a file may be the whole file of another state."""


def mutations_of(name: str) -> dict[str, Mutation]:
    """All that can be done to a file of this name."""
    of_suffix = {"json": {**JSON, **SEALED_JSON}, "safetensors": HEADER, "pt": PICKLE, "bin": PICKLE}
    return {**BYTES, **of_suffix.get(name.rpartition(".")[2], {})}


def _with_change(rng: random.Random, data: bytes, change: Callable[[random.Random, Any, Any], object]) -> bytes:
    content = json.loads(data)
    holder, key = content, rng.choice(list(content))
    while isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    change(rng, holder, key)
    return json.dumps(content).encode()
