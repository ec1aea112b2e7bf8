"""The manifest of a checkpoint: which files it consists of, how long each is, and a checksum of each.

It is the last file to be written, and its folder gets the name of a checkpoint after that: a folder of that name
without a whole manifest has been damaged. Checksums are CRC-32 (``zlib``), as 8 hexadecimal digits. That of a
safetensors file covers its header, which holds the checksums of the tensors; that of any other file all of its bytes::

    {"format": "gemini-memory checkpoint", "version": 1, "id": "5f0c...", "world_size": 2,
     "parts": {"model": [""], "optimizer": [""], "rng": ["00000", "00001"]},
     "files": {"model.safetensors": {"bytes": 1300, "crc32": "05f1c2aa"}, ...},
     "crc32": "77ab01d0"}                                  of the manifest itself, without this entry
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gemini.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
FORMAT = "gemini-memory checkpoint"
VERSION = 1
_LIMIT_BYTES = 100_000_000
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    crc32: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """The record of a file that is there.

        Raises
        ------
        CheckpointError
            If it cannot be read.
        """
        try:
            with open(path, "rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                left = nbytes
                if path.suffix == ".safetensors":
                    left = min(nbytes, 8 + int.from_bytes(file.read(8), "little"))
                    file.seek(0)
                crc = 0
                while left and (block := file.read(min(left, _BLOCK_BYTES))):
                    crc, left = zlib.crc32(block, crc), left - len(block)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        return cls(nbytes, f"{crc:08x}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a checkpoint consists of."""

    id: str
    """Of the state of training that was saved."""
    world_size: int
    """Ranks that saved it."""
    parts: Mapping[str, tuple[str, ...]]
    """What was saved (``"model"``, ``"optimizer"``, ...) and the names under which; ``""`` where it is only one."""
    files: Mapping[str, FileRecord]
    """By path relative to the folder of the checkpoint."""

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in a folder.

        Raises
        ------
        CheckpointError
            If there is none, or it is damaged or of another version.
        """
        path = folder / MANIFEST_NAME
        content = _read(path)
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not the manifest of a checkpoint of booster.save")
        if content.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has version {content.get('version')!r}; this package reads version {VERSION}: install the "
                "version of gemini-memory that wrote it, or a newer one"
            )
        if content.pop("crc32", None) != _crc(content):
            raise CheckpointError(f"{path} is damaged: it does not have the checksum that it had when it was written")
        try:
            parts = {kind: tuple(map(str, names)) for kind, names in content["parts"].items()}
            files = {_inside(n): FileRecord(_whole(f["bytes"]), str(f["crc32"])) for n, f in content["files"].items()}
            return cls(id=str(content["id"]), world_size=_whole(content["world_size"]), parts=parts, files=files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a manifest: {type(error).__name__} {error}") from error

    def text(self) -> str:
        """What `read` reads."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**content, "crc32": _crc(content)}, indent=1) + "\n"

    def check(self, folder: Path, *, verify: bool = True, share: tuple[int, int] = (0, 1)) -> None:
        """See whether all files are there with the lengths, and with ``verify`` the checksums, of the manifest.

        Parameters
        ----------
        share
            Of several ranks that check together, the number of this one and how many they are: they divide the files
            whose checksums are compared.

        Raises
        ------
        CheckpointError
            Naming every file that is not.
        """
        index, count = share
        by_size = sorted(self.files, key=lambda name: (-self.files[name].bytes, name))
        compared = set(by_size[index::count] if verify else ())
        found = (_fault(folder / name, record, name in compared) for name, record in self.files.items())
        faults = [fault for fault in found if fault]
        if faults:
            raise CheckpointError(f"{folder} is damaged:\n    " + "\n    ".join(faults))


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            is_short = os.fstat(file.fileno()).st_size <= _LIMIT_BYTES
            data = file.read() if is_short else b""  # not read(limit), which takes that memory first
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not is_short:
        raise CheckpointError(f"{path} is longer than {_LIMIT_BYTES} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return content


def _crc(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} in the place of a whole number")
    return number


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"a file outside of the folder: {name!r}")
    return name


def _fault(path: Path, expected: FileRecord, verify: bool) -> str:
    """What is wrong with a file, in words; empty if nothing is."""
    try:
        nbytes = path.stat().st_size
    except OSError as error:
        return f"{path.name}: {error.strerror or error}"
    if nbytes != expected.bytes:
        return f"{path.name} has {nbytes} bytes, {expected.bytes} were written"
    if verify and (found := FileRecord.of(path).crc32) != expected.crc32:
        return f"{path.name} has the checksum {found}, it was written with {expected.crc32}"
    return ""
