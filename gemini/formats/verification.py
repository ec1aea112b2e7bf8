"""Is everything in a checkpoint as it was written? Of ours, of folders in the Hugging Face layout, of single files.

A manifest has the sizes and checksums of all files of its folder. Files without one may have checksums in themselves:
safetensors files of ours one for each tensor, zips of ``torch.save`` one for each record, ``optimizer.json`` one of its
text. Of the others only the structure is looked at: that a header and the file's size agree, that an index names
tensors which are there.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from gemini.formats.safetensors_file import Malformed, damaged, read_header

from .blocks import FileBytes
from .damage import Damaged, Unreadable, listed, shown
from .json_file import check_checksum, read_json
from .manifest import MANIFEST_NAME, Manifest
from .torch_zip import is_zip, verify_zip

LATEST = "latest"
OPTIMIZER = "optimizer.json"
_INDEX = ".index.json"
_JSON = ("config.json", "generation_config.json", "adapter_config.json")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_DISTRIBUTED = ".distcp"
_CHECKPOINT = re.compile(r"checkpoint-\d{6,}")
_OF_TRAINER = "trainer_state.json"
"""In each checkpoint of transformers' Trainer, which numbers them without zeros in front."""
_BEFORE_ZIP = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save began before version 1.6."""

Tell = Callable[[int], None]
"""Told the bytes that have been looked at since it was told before."""


class State(Enum):
    """What became of looking at a file."""

    WHOLE = "whole"
    """It has the checksums that it was written with."""
    NO_CHECKSUM = "no_checksum"
    """Nothing is wrong with its structure, and there is nothing to compare its values with."""
    DAMAGED = "damaged"
    UNREADABLE = "unreadable"
    """The system does not let us read it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one file."""

    name: str
    """Relative to the folder of the checkpoint."""
    nbytes: int | None
    """None if it is not there."""
    state: State
    text: str
    """What was compared, or what is wrong."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint, or a single file, that has been looked at."""

    path: Path
    id: str | None
    """Of the training state in its manifest; None without one."""
    verdicts: tuple[Verdict, ...]

    @property
    def state(self) -> State:
        """The worst of its files'; that a configuration has no checksum is nothing bad."""
        order = list(State)
        ignored = {v for v in self.verdicts if v.state is State.NO_CHECKSUM and v.name.endswith(".json")}
        return max((v.state for v in self.verdicts if v not in ignored), key=order.index, default=State.NO_CHECKSUM)

    @property
    def nbytes(self) -> int:
        return sum(verdict.nbytes or 0 for verdict in self.verdicts)


def find(path: Path) -> list[Path]:
    """All checkpoints at or below a path: folders that hold files of one, or the file itself.

    Raises
    ------
    Unreadable
        If there is no such path, or nothing there is a checkpoint's.
    """
    if path.name == LATEST and path.is_file():  # where links cannot be made
        with open(path, "rb") as file:
            path = path.with_name(file.read(200).decode(errors="replace").strip())
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise Unreadable(f"{path}: there is no such file or folder")
    found = []
    for folder, below, files in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if MANIFEST_NAME in files:
            below.clear()  # the manifest names what is in there
        if any(_is_known(name) for name in files) or _lost_manifest(Path(folder)):
            found.append(Path(folder))
    if not found:
        raise Unreadable(f"{path} holds no checkpoint: no {MANIFEST_NAME}, no .safetensors, .bin or .pt files")
    return found


def nbytes_of(path: Path) -> int:
    """What there is to be read."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def verify(path: Path, tell: Tell = lambda nbytes: None) -> Verified:
    """Look at everything in one of the places of `find`. No fault raises: each is a verdict."""
    if path.is_file():
        return Verified(path, None, (_verdict(path, path.name, tell),))
    if (path / MANIFEST_NAME).is_file():
        try:
            manifest = Manifest.read(path)
        except Damaged as error:
            return Verified(path, None, (_fault(path, MANIFEST_NAME, error),))
        return Verified(path, manifest.id, tuple(_of_manifest(path, manifest, tell)))
    # A pipe or a link that leads nowhere has a verdict, too: with that name it stands for a file that is not there.
    names = sorted(file.name for file in path.iterdir() if _is_known(file.name) and not file.is_dir())
    elsewhere = {name for index in names for name in _named_by(path / index) if "/" in name}
    found = [_verdict(path / name, name, tell) for name in (*names, *sorted(elsewhere))]
    if _lost_manifest(path):
        text = "is not there: this is not a whole checkpoint of booster.save, and booster.load refuses it"
        found.insert(0, Verdict(MANIFEST_NAME, None, State.DAMAGED, text))
    return Verified(path, None, tuple(found))


def _lost_manifest(folder: Path) -> bool:
    """True for what has the name of a checkpoint of booster.save, which begins with a manifest; not transformers'."""
    if not _CHECKPOINT.fullmatch(folder.resolve().name):
        return False
    return not any((folder / name).is_file() for name in (MANIFEST_NAME, _OF_TRAINER))


def _of_manifest(folder: Path, manifest: Manifest, tell: Tell) -> Iterator[Verdict]:
    yield Verdict(MANIFEST_NAME, _size(folder / MANIFEST_NAME), State.WHOLE, f"names {len(manifest.files)} files")
    for name, record in manifest.files.items():
        path = folder / name
        try:
            fault = record.fault(path, verify=True)
        except Damaged as error:
            yield _fault(folder, name, error)
            continue
        if fault:
            yield Verdict(name, _size(path), State.DAMAGED, fault)
        elif path.suffix == ".safetensors":
            yield _verdict(path, name, tell)
        else:
            tell(record.bytes)
            yield Verdict(name, record.bytes, State.WHOLE, "checksum in the manifest")


def _verdict(path: Path, name: str, tell: Tell) -> Verdict:
    told = 0

    def telling(nbytes: int) -> None:
        nonlocal told
        told += nbytes
        tell(nbytes)

    try:
        has_checksums, text = _check(path, telling)
    except Damaged as error:
        return _fault(path.parent if name == path.name else path, name, error)
    nbytes = _size(path) or 0
    tell(nbytes - told)
    return Verdict(name, nbytes, State.WHOLE if has_checksums else State.NO_CHECKSUM, text)


def _check(path: Path, tell: Tell) -> tuple[bool, str]:
    """Whether a file has checksums, and what it is; raises `Damaged` if it is not whole."""
    if path.suffix == ".safetensors":
        return _check_tensors(path, tell)
    if path.suffix in _TORCH:
        return _check_torch(path, tell)
    if path.suffix == _DISTRIBUTED:
        with FileBytes(path):
            return False, "values of torch.distributed.checkpoint"
    content = read_json(path)
    if path.name.endswith(OPTIMIZER):
        _check_named(path, content)
        has_checksum = check_checksum(path, content)
        return has_checksum, "checksum of itself" if has_checksum else "groups and steps of an optimizer"
    if path.name.endswith(_INDEX):
        _check_named(path, content)
        return False, f"index of {len(content['weight_map'])} tensors, which are there"
    return False, "readable JSON"


def _check_tensors(path: Path, tell: Tell) -> tuple[bool, str]:
    told = 0

    def so_far(nbytes: int) -> None:
        nonlocal told
        tell(nbytes - told)
        told = nbytes

    with FileBytes(path) as file:
        try:
            header = read_header(file.fd)
            wrong = damaged(file.fd, header, so_far)
        except Malformed as error:
            raise Damaged(f"{path} is not a whole safetensors file: {error}") from error
        except OSError as error:
            raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
    if wrong:
        raise Damaged(f"{path} has other bytes than were saved in {listed(wrong)}")
    tensors = f"{len(header.tensors)} tensor{'s' if len(header.tensors) != 1 else ''}"
    return header.checksums is not None, tensors if header.checksums is None else f"checksums of {tensors}"


def _check_torch(path: Path, tell: Tell) -> tuple[bool, str]:
    if is_zip(path):
        has_checksums = verify_zip(path, tell)
        return has_checksums, "checksums of torch.save" if has_checksums else "file of torch.save"
    with FileBytes(path) as file:
        begins = file.read(0, min(len(_BEFORE_ZIP), file.nbytes), "its beginning")
    if begins != _BEFORE_ZIP:
        raise Damaged(f"{path} is not a file of torch.save")
    return False, "file of torch.save from before 1.6; only its beginning was looked at"


def _check_named(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `Damaged` unless all files and tensors that an index names are there."""
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise Damaged(f"{path} is not the index of a checkpoint: it has no weight_map from names to files")
    for file in dict.fromkeys(weight_map.values()):
        named = PurePosixPath(file)
        if named.is_absolute() or ".." in named.parts:
            raise Damaged(f"{path} names a file outside of its folder: {shown(file)}")
        if not (path.parent / file).is_file():
            raise Damaged(f"{path} names {shown(file)}, which is not there")
        wanted = [name for name, home in weight_map.items() if home == file]
        if lost := sorted(set(wanted) - _names_in(path.parent / file, wanted)):
            raise Damaged(f"{path} names tensors that are not in {shown(file)}: {listed(lost)}")


def _names_in(path: Path, wanted: list[str]) -> set[str]:
    """The tensors in a safetensors file; of other files, and of damaged ones with their own verdict, as wanted."""
    if path.suffix != ".safetensors":
        return set(wanted)
    try:
        with FileBytes(path) as file:
            return set(read_header(file.fd).tensors)
    except (Damaged, Malformed, OSError):
        return set(wanted)


def _named_by(path: Path) -> set[str]:
    if not path.name.endswith((_INDEX, OPTIMIZER)):
        return set()
    try:
        weight_map = read_json(path).get("weight_map")
        return {name for name in weight_map.values() if (path.parent / name).is_file()}  # type: ignore[union-attr]
    except (Damaged, AttributeError, TypeError, ValueError):
        return set()  # the index has a verdict of its own


def _fault(folder: Path, name: str, error: Damaged) -> Verdict:
    state = State.UNREADABLE if isinstance(error, Unreadable) else State.DAMAGED
    return Verdict(name, _size(folder / name), state, str(error).replace(f"{folder / name} ", "", 1))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_known(name: str) -> bool:
    return name in (MANIFEST_NAME, *_JSON) or name.endswith((".safetensors", *_TORCH, _DISTRIBUTED, _INDEX, OPTIMIZER))
