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
from typing import Any, TypeVar

from gemini.safe_files import open_regular

from .damage import Damaged, Unreadable, listed, shown
from .json_file import CHECKSUM, check_checksum, checksum_of, read_json

MANIFEST_NAME = "manifest.json"
FORMAT = "gemini-memory checkpoint"
VERSION = 1
_BLOCK_BYTES = 1 << 20

_Record = TypeVar("_Record", bound="FileRecord")
_Manifest = TypeVar("_Manifest", bound="Manifest")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    crc32: str

    @classmethod
    def of(cls: type[_Record], path: Path) -> _Record:
        """The record of a file that is there.

        Raises
        ------
        Damaged
            If it cannot be read.
        """
        try:
            with open(open_regular(path), "rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                left = nbytes
                if path.suffix == ".safetensors":
                    left = min(nbytes, 8 + int.from_bytes(file.read(8), "little"))
                    file.seek(0)
                crc = 0
                while left and (block := file.read(min(left, _BLOCK_BYTES))):
                    crc, left = zlib.crc32(block, crc), left - len(block)
        except OSError as error:
            raise Unreadable(f"{path} cannot be read: {error.strerror or error}") from error
        return cls(nbytes, f"{crc:08x}")

    def fault(self, path: Path, *, verify: bool) -> str:
        """What is wrong with the file that is there, in words; empty if nothing is."""
        try:
            nbytes = path.stat().st_size
        except OSError as error:
            return f"{path.name}: {error.strerror or error}"
        if nbytes != self.bytes:
            return f"{path.name} has {nbytes} bytes, {self.bytes} were written"
        if verify and (found := FileRecord.of(path).crc32) != self.crc32:
            return f"{path.name} has the checksum {found}, it was written with {shown(self.crc32)}"
        return ""


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
    def read(cls: type[_Manifest], folder: Path) -> _Manifest:
        """The manifest in a folder.

        Raises
        ------
        Damaged
            If there is none, or it is damaged or of another version.
        """
        path = folder / MANIFEST_NAME
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise Damaged(f"{path} is not the manifest of a checkpoint of booster.save")
        if content.get("version") != VERSION:
            raise Damaged(
                f"{path} has version {shown(content.get('version'))}; this package reads version {VERSION}: install "
                "the version of gemini-memory that wrote it, or a newer one"
            )
        if not check_checksum(path, content):
            raise Damaged(f"{path} is damaged: it has no checksum")
        try:
            parts = {kind: tuple(map(str, names)) for kind, names in content["parts"].items()}
            files = {_inside(n): FileRecord(_whole(f["bytes"]), str(f["crc32"])) for n, f in content["files"].items()}
            return cls(id=str(content["id"]), world_size=_whole(content["world_size"]), parts=parts, files=files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(f"{path} is not a manifest: {type(error).__name__} {shown(error)}") from error

    def text(self) -> str:
        """What `read` reads."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**content, CHECKSUM: checksum_of(content)}, indent=1) + "\n"

    def check(self, folder: Path, *, verify: bool = True, share: tuple[int, int] = (0, 1)) -> None:
        """See whether all files are there with the lengths, and with ``verify`` the checksums, of the manifest.

        Parameters
        ----------
        share
            Of several ranks that check together, the number of this one and how many they are: they divide the files
            whose checksums are compared.

        Raises
        ------
        Damaged
            Naming the files that are not.
        """
        index, count = share
        by_size = sorted(self.files, key=lambda name: (-self.files[name].bytes, name))
        compared = set(by_size[index::count] if verify else ())
        found = (record.fault(folder / name, verify=name in compared) for name, record in self.files.items())
        if faults := [fault for fault in found if fault]:
            raise Damaged(f"{folder} is damaged:\n    " + listed(faults, "\n    ", width=300))


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{shown(number)} in the place of a whole number")
    return number


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"a file outside of the folder: {name!r}")
    return name
