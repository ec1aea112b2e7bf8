"""A checkpoint before it is written, and how it is committed.

Preparing, on the training thread, lists the files (`contents`) and takes what is small and changes (random states,
positions, options). What is left then is to read and write tensors.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import committed
from .averages import average_contents
from .contents import Bytes, Content, Inside, TorchFile
from .folder import sync_folder
from .given_parts import DATALOADER, LR_SCHEDULER, MODEL, OPTIMIZER, Part
from .manifest import MANIFEST_NAME, FileRecord, Manifest
from .model_contents import model_contents
from .optimizer_contents import optimizer_contents
from .random_states import random_states
from .run_files import EXTRA, EXTRA_FILE, RNG, SCHEDULER_FILE, dataloader_file, rng_file
from .stage import Stage
from .torch_file import plain, plain_bytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checkpoint that is ready to be written."""

    id: str
    world_size: int
    parts: Mapping[str, tuple[str, ...]]
    contents: Sequence[Content]

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        of_ranks: Sequence[Mapping[str, Any]],
        extra: Any,
        limit: int,
        writers: Sequence[int] = (0,),
    ) -> "Prepared":
        """List the files.

        Parameters
        ----------
        of_ranks
            Those that each rank has of its own, by name.
        limit
            Bytes of a file of tensors.
        writers
            The ranks that write such files.
        """
        contents = [content for part in parts for content in _contents(part, limit, writers)]
        contents += [Bytes(name, data) for files in of_ranks for name, data in files.items()]
        names = {part.kind: tuple(p.name for p in parts if p.kind == part.kind) for part in parts}
        if extra is not None:
            contents.append(TorchFile(EXTRA_FILE, plain(extra, "extra")))
            names[EXTRA] = ("",)
        names[RNG] = tuple(f"{rank:05d}" for rank in range(len(of_ranks)))
        return cls(secrets.token_hex(16), len(of_ranks), names, contents)

    def commit(self, stage: Stage, keep: int | None, others: Mapping[str, FileRecord]) -> Path:
        """Commit a stage in which all files are; ``others`` are those that are not of `contents`."""
        self._seal(stage, others)
        with stage.alone():
            path = committed.commit(stage.path, stage.folder)
            if committed.point_latest(path):
                committed.prune(stage.folder, keep)
        return path

    def _seal(self, stage: Stage, others: Mapping[str, FileRecord]) -> None:
        """Write the manifest; from here on nothing changes."""
        files = {content.name: FileRecord.of(stage.path / content.name) for content in self.contents}
        manifest = Manifest(id=self.id, world_size=self.world_size, parts=self.parts, files={**files, **others})
        for name in sorted({folder for file in manifest.files if (folder := file.rpartition("/")[0])}):
            sync_folder(stage.path / name)
        stage.write_text(MANIFEST_NAME, manifest.text())
        sync_folder(stage.path)


def own_files(parts: Sequence[Part], rank: int) -> dict[str, bytes]:
    """Files that each rank has of its own, by name."""
    found = {rng_file(rank): plain_bytes(random_states(), "the random states")}
    for part in parts:
        if part.kind == DATALOADER:
            found[part.path(dataloader_file(rank))] = plain_bytes(part.value.state_dict(), f"the state of the {part}")
    return found


def _contents(part: Part, limit: int, writers: Sequence[int]) -> Iterator[Content]:
    contents: list[Content] = []
    if part.kind == MODEL:
        contents = [*model_contents(part.value, limit, writers), *average_contents(part.value, writers[0])]
    elif part.kind == OPTIMIZER:
        contents = optimizer_contents(part.value, limit, writers)
    elif part.kind == LR_SCHEDULER:
        contents = [Bytes(SCHEDULER_FILE, plain_bytes(part.value.state_dict(), f"the state of the {part}"))]
    yield from (Inside(part.name, content) if part.name else content for content in contents)
