"""Saving and loading all that a training run consists of as one checkpoint, which is committed or is not there.

::

    folder/checkpoint-000012/
        model.safetensors, config.json ...         the Hugging Face layout, see `model_io`
        optimizer.json, optimizer.safetensors      see `optimizer_files`
        lr_scheduler.pt
        dataloader-00000.pt, rng-00000.pt          one for each rank
        extra.pt                                   what the user gave
        manifest.json                              see `manifest`; written last

Parts that are given as a dict (the models of a GAN) are in a folder for each name. Preparing, on the training thread,
lists the files (`contents`) and takes what is small and changes; what is left then is to write them.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError

from . import committed
from .background import save_in_background
from .contents import Bytes, Content, Inside, Saving, write_all
from .folder import sync_folder
from .given_parts import DATALOADER, LR_SCHEDULER, MODEL, OPTIMIZER, Part
from .manifest import MANIFEST_NAME, FileRecord, Manifest
from .model_io import checked_model, model_contents
from .optimizer_files import FILE_NAME, JSON_NAME
from .optimizer_io import checked_optimizer, optimizer_contents
from .random_states import Restored, random_states
from .ranks import checked_by_all, loaded_by_all, place_of, together_of, told_by_all, wait_for_saves, write_once
from .safetensors_stream import OpenFiles
from .scheduler_io import checked_lr_scheduler
from .stage import Stage
from .torch_file import plain_bytes, read_torch
from .weight_files import INDEX_SUFFIX, SAFE_NAME, size_limit

_SCHEDULER_FILE, _EXTRA_FILE = "lr_scheduler.pt", "extra.pt"
_RNG, _EXTRA = "rng", "extra"
_LOADED = (DATALOADER, LR_SCHEDULER, MODEL, OPTIMIZER)
"""The order in which parts are loaded."""


def save_checkpoint(
    folder: str | Path,
    parts: Sequence[Part],
    *,
    extra: Any = None,
    keep: int | None = 3,
    size_per_shard: int | str,
    use_async: bool = False,
) -> Path:
    """Write everything as one checkpoint, and commit it.

    Parameters
    ----------
    size_per_shard
        Of files of tensors, at most: MiB as a number, or ``"5GB"``.

    Returns
    -------
    Path
        The folder of the checkpoint, absolute; where it is written in the background, the one that it will be in.

    See `gemini.booster.Booster.save` for the rest.
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep is how many checkpoints stay, 1 or more, or None for all; got {keep!r}")
    limit = size_limit(size_per_shard)
    path = Path(folder).absolute()
    leader = _leaders(parts)[0]
    doing = f"booster.save to {path}"
    wait_for_saves(*(part.value for part in parts))
    own = told_by_all(leader, doing, lambda: _of_rank(parts, place_of(leader)[0]))
    committed_as: list[str] = []

    def listed() -> Saving:
        prepared = Prepared.of(parts, own, extra, limit)

        def write(contents: Sequence[Content]) -> None:
            committed_as.append(str(replace(prepared, contents=contents).write(path, keep)))

        return Saving(prepared.contents, write)

    if use_async and save_in_background([part.value for part in parts], doing, listed):
        return path
    write_once(leader, doing, lambda: listed().run())
    (name, *_) = told_by_all(leader, f"the end of {doing}", lambda: {"path": "".join(committed_as)})
    return Path(str(name["path"]))


def load_checkpoint(
    path: str | Path, parts: Sequence[Part], *, strict: bool = True, verify: bool = True, rng: bool = True
) -> Any:
    """Read a checkpoint into the parts; returns what was saved as ``extra``.

    See `gemini.booster.Booster.load`.
    """
    leaders = _leaders(parts)
    doing = f"booster.load from {path}"
    wait_for_saves(*(part.value for part in parts))
    with ExitStack() as files:
        with checked_by_all(leaders[0], doing):
            stored = _Stored.at(Path(path).absolute(), verify)
            loads = stored.checked(parts, files, place_of(leaders[0]), strict=strict, rng=rng)
            extra = stored.extra()
        with ExitStack() as changes:
            for leader in leaders:
                changes.enter_context(loaded_by_all(leader, doing))
            for load in loads:
                load()
    return extra


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checkpoint that is ready to be written."""

    id: str
    world_size: int
    parts: Mapping[str, tuple[str, ...]]
    contents: Sequence[Content]

    @classmethod
    def of(cls, parts: Sequence[Part], of_ranks: Sequence[Mapping[str, Any]], extra: Any, limit: int) -> "Prepared":
        """List the files; ``of_ranks`` are those that each rank has of its own, by name."""
        contents = [content for part in parts for content in _contents(part, limit)]
        contents += [Bytes(name, data) for files in of_ranks for name, data in files.items()]
        names = {part.kind: tuple(p.name for p in parts if p.kind == part.kind) for part in parts}
        if extra is not None:
            contents.append(Bytes(_EXTRA_FILE, plain_bytes(extra, "extra")))
            names[_EXTRA] = ("",)
        names[_RNG] = tuple(f"{rank:05d}" for rank in range(len(of_ranks)))
        return cls(secrets.token_hex(16), len(of_ranks), names, contents)

    def write(self, folder: Path, keep: int | None) -> Path:
        """Write the files into a stage, commit it, and remove the oldest checkpoints."""
        with Stage(folder, committed.STAGE_NAME) as stage:
            for name in self._folders():
                (stage.path / name).mkdir()
            write_all(stage, self.contents)
            self._seal(stage)
            path = committed.commit(stage.path, folder)
        if committed.point_latest(path) and keep is not None:
            committed.prune(folder, keep)
        return path

    def _seal(self, stage: Stage) -> None:
        """Write the manifest; from here on nothing changes."""
        files = {content.name: FileRecord.of(stage.path / content.name) for content in self.contents}
        manifest = Manifest(id=self.id, world_size=self.world_size, parts=self.parts, files=files)
        for name in self._folders():
            sync_folder(stage.path / name)
        stage.write_text(MANIFEST_NAME, manifest.text())
        sync_folder(stage.path)

    def _folders(self) -> list[str]:
        """Those of parts that have a name."""
        return sorted({folder for content in self.contents if (folder := content.name.rpartition("/")[0])})


@dataclass(frozen=True, slots=True)
class _Stored:
    """A checkpoint that is there, whole."""

    folder: Path
    manifest: Manifest
    verify: bool

    @classmethod
    def at(cls, path: Path, verify: bool) -> "_Stored":
        folder = committed.find(path)
        try:
            manifest = Manifest.read(folder)
            manifest.check(folder, verify=verify)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{committed.whole_one(folder)}") from error
        return cls(folder, manifest, verify)

    def checked(
        self, parts: Sequence[Part], files: ExitStack, place: tuple[int, int], *, strict: bool, rng: bool
    ) -> list[Callable[[], None]]:
        """Check everything; returns what loads it, in this order."""
        saved = self.manifest.parts
        missing = [part for part in parts if part.name not in saved.get(part.kind, ())]
        if missing and strict:
            has = ", ".join(f"{kind} {name!r}" if name else kind for kind, names in saved.items() for name in names)
            raise CheckpointError(
                f"{self.folder} has no {', '.join(map(str, missing))}; it has {has}. Nothing was changed; with "
                "strict=False what it does not have is left as it is"
            )
        # First those that look at what they get only when they load it: so far nothing has been changed.
        found = sorted((part for part in parts if part not in missing), key=lambda part: _LOADED.index(part.kind))
        loads = [self._checked(part, files.enter_context(OpenFiles()), place, strict) for part in found]
        rank, _ = place
        if rng and f"{rank:05d}" in saved.get(_RNG, ()):
            file = self.folder / _rng_file(rank)
            loads.append(Restored(read_torch(file, mmap=False), str(file)).set)  # last: loading may draw numbers
        return loads

    def extra(self) -> Any:
        return read_torch(self.folder / _EXTRA_FILE, mmap=False) if _EXTRA in self.manifest.parts else None

    def _checked(self, part: Part, files: OpenFiles, place: tuple[int, int], strict: bool) -> Callable[[], None]:
        if part.kind == MODEL:
            weights = self._file(part, SAFE_NAME, SAFE_NAME + INDEX_SUFFIX)
            return checked_model(part.value, weights, files, strict=strict, verify=self.verify)
        if part.kind == OPTIMIZER:
            return checked_optimizer(part.value, self._file(part, JSON_NAME, FILE_NAME), files, verify=self.verify)
        if part.kind == LR_SCHEDULER:
            return checked_lr_scheduler(part.value, self._file(part, _SCHEDULER_FILE))
        return partial(_load_dataloader, part, self._dataloader(part, *place))

    def _file(self, part: Part, *names: str) -> Path:
        """The file of a part, under the first of its names that the checkpoint has."""
        found = next((name for name in names if part.path(name) in self.manifest.files), None)
        if found is None:
            raise CheckpointError(f"{self.folder} has none of the files {', '.join(map(part.path, names))} of {part}")
        return self.folder / part.path(found)

    def _dataloader(self, part: Part, rank: int, count: int) -> Path:
        """The state of this rank; with another number of ranks, that of all, if they agree."""
        paths = [self._file(part, _dataloader_file(index)) for index in range(self.manifest.world_size)]
        if len(paths) == count:
            return paths[rank]
        if len({path.read_bytes() for path in paths}) > 1:
            raise CheckpointError(
                f"{self.folder} holds positions of {part} on {len(paths)} ranks that differ, and cannot be divided "
                f"among {count}: load with as many ranks, or leave the dataloader out. A loader of "
                "booster.plugin.prepare_dataloader can be resumed with any number"
            )
        return paths[0]


def _load_dataloader(part: Part, path: Path) -> None:
    state = read_torch(path, mmap=False)
    try:
        part.value.load_state_dict(state)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{path} does not fit the {part}: {error}") from error


def _of_rank(parts: Sequence[Part], rank: int) -> dict[str, bytes]:
    """Files that each rank has of its own, by name."""
    found = {_rng_file(rank): plain_bytes(random_states(), "the random states")}
    for part in parts:
        if part.kind == DATALOADER:
            found[part.path(_dataloader_file(rank))] = plain_bytes(part.value.state_dict(), f"the state of the {part}")
    return found


def _contents(part: Part, limit: int) -> Iterator[Content]:
    contents: list[Content] = []
    if part.kind == MODEL:
        contents = model_contents(part.value, limit)
    elif part.kind == OPTIMIZER:
        contents = optimizer_contents(part.value, limit)
    elif part.kind == LR_SCHEDULER:
        contents = [Bytes(_SCHEDULER_FILE, plain_bytes(part.value.state_dict(), f"the state of the {part}"))]
    yield from (Inside(part.name, content) if part.name else content for content in contents)


def _leaders(parts: Sequence[Part]) -> list[Any]:
    """One object of each group of ranks that keeps some of the parts together; any object where there is none."""
    found = {id(group): part.value for part in reversed(parts) if (group := together_of(part.value)) is not None}
    return [*found.values()][::-1] or [None]


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


def _dataloader_file(rank: int) -> str:
    return f"dataloader-{rank:05d}.pt"
