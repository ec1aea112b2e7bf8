"""A checkpoint of a training run that is there: everything in it is checked before anything is changed."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError
from gemini.formats.json_file import LIMIT_BYTES
from gemini.safe_files import read_file

from . import committed
from .averages import checked_averages, warn_of_left_out
from .given_parts import DATALOADER, LR_SCHEDULER, MODEL, OPTIMIZER, Part, pairs
from .manifest import Manifest
from .model_io import checked_model
from .optimizer_files import FILE_NAME, JSON_NAME
from .optimizer_io import checked_optimizer
from .pairs import Checked, check_pairs
from .random_states import Restored
from .run_files import EXTRA, EXTRA_FILE, RNG, SCHEDULER_FILE, dataloader_file, rank_name, rng_file
from .safetensors_stream import OpenFiles
from .scheduler_io import checked_lr_scheduler
from .torch_file import read_torch
from .weight_files import INDEX_SUFFIX, SAFE_NAME


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint that is there, whole."""

    folder: Path
    manifest: Manifest
    verify: bool

    @classmethod
    def at(cls, path: Path, verify: bool, place: tuple[int, int]) -> "Stored":
        """The checkpoint that ``path`` names; the ranks, of which ``place`` is one, divide the checksums of files."""
        folder = committed.find(path)
        try:
            manifest = Manifest.read(folder)
            manifest.check(folder, verify=verify, share=place)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{committed.whole_one(folder)}") from error
        return cls(folder, manifest, verify)

    def checked(
        self, parts: Sequence[Part], files: ExitStack, place: tuple[int, int], *, strict: bool, rng: bool
    ) -> list[Callable[[], None]]:
        """Check everything; returns what loads it, in this order.

        Parameters
        ----------
        files
            Takes what has to stay open until it is loaded.
        place
            The rank of this process, and the number of ranks.
        """
        present = self._present(parts, strict)
        # First those that look at what they get only when they load it: so far nothing has been changed.
        loaders = [(part, self._dataloader(part, *place)) for part in present if part.kind == DATALOADER]
        states = [(part, path, read_torch(path, mmap=False)) for part, path in loaders]
        loads: list[Callable[[], None]] = [partial(_load_dataloaders, states)] if states else []
        loads += [
            checked_lr_scheduler(part.value, self._file(part, SCHEDULER_FILE))
            for part in present
            if part.kind == LR_SCHEDULER
        ]
        tensors = [part for part in present if part.kind in (MODEL, OPTIMIZER)]
        if any(self._is_distributed(part) for part in tensors):
            loads += self._checked_together(tensors, strict)
        else:
            opened = [files.enter_context(OpenFiles()) for _ in tensors]
            found = [self._checked(part, each, strict) for part, each in zip(tensors, opened, strict=True)]
            check_pairs(found)
            models = [part for part in tensors if part.kind == MODEL]
            opened += [files.enter_context(OpenFiles()) for _ in models]
            averages = [
                self._checked_averages(part, each, strict)
                for part, each in zip(models, opened[len(tensors) :], strict=True)
            ]
            if self.verify:
                self._verify(opened)
            loads += [*(each.load for each in found), *chain.from_iterable(averages)]
        rank, _ = place
        if rng and rank_name(rank) in self.manifest.parts.get(RNG, ()):
            file = self.folder / rng_file(rank)
            loads.append(Restored(read_torch(file, mmap=False), str(file)).set)  # last: loading may draw numbers
        return loads

    def extra(self) -> Any:
        return read_torch(self.folder / EXTRA_FILE, mmap=False) if EXTRA in self.manifest.parts else None

    def _present(self, parts: Sequence[Part], strict: bool) -> list[Part]:
        """The parts that the checkpoint has."""
        saved = self.manifest.parts
        missing = [part for part in parts if part.name not in saved.get(part.kind, ())]
        if missing and strict:
            has = ", ".join(f"{kind} {name!r}" if name else kind for kind, names in saved.items() for name in names)
            raise CheckpointError(
                f"{self.folder} has no {', '.join(map(str, missing))}; it has {has}. Nothing was changed; with "
                "strict=False what it does not have is left as it is"
            )
        return [part for part in parts if part not in missing]

    def _is_distributed(self, part: Part) -> bool:
        """True if it was saved with ``layout="dcp"``."""
        return part.path(".metadata") in self.manifest.files

    def _checked_together(self, parts: Sequence[Part], strict: bool) -> list[Callable[[], None]]:
        """Models, each with the optimizer of the same name."""
        from . import dcp  # takes a second to import

        return [
            dcp.checked(self.folder / name, model, optimizer, strict=strict, id=self.manifest.id)
            for name, model, optimizer in pairs(parts)
        ]

    def _checked(self, part: Part, files: OpenFiles, strict: bool) -> Checked:
        if part.kind == MODEL:
            weights = self._file(part, SAFE_NAME, SAFE_NAME + INDEX_SUFFIX)
            return checked_model(part.value, weights, files, strict=strict, verify=False)
        states = self._file(part, JSON_NAME, FILE_NAME)
        return checked_optimizer(part.value, states, files, strict=strict, verify=False)

    def _verify(self, opened: Sequence[OpenFiles]) -> None:
        try:
            for files in opened:
                files.verify()
        except CheckpointError as error:
            raise CheckpointError(f"{error}{committed.whole_one(self.folder)}") from error

    def _checked_averages(self, part: Part, files: OpenFiles, strict: bool) -> list[Callable[[], None]]:
        def find(name: str) -> Path | None:
            return None if not strict and part.path(name) not in self.manifest.files else self._file(part, name)

        folder = part.path("")
        beside = [name.removeprefix(folder) for name in self.manifest.files if name.startswith(folder)]
        warn_of_left_out(part.value, [name for name in beside if "/" not in name], str(self.folder))
        return checked_averages(part.value, find, files)

    def _file(self, part: Part, *names: str) -> Path:
        """The file of a part, under the first of its names that the checkpoint has."""
        found = next((name for name in names if part.path(name) in self.manifest.files), None)
        if found is None:
            raise CheckpointError(f"{self.folder} has none of the files {', '.join(map(part.path, names))} of {part}")
        return self.folder / part.path(found)

    def _dataloader(self, part: Part, rank: int, count: int) -> Path:
        """The state of this rank; with another number of ranks, that of all, if they agree."""
        paths = [self._file(part, dataloader_file(index)) for index in range(self.manifest.world_size)]
        if len(paths) == count:
            return paths[rank]
        if len({read_file(path, LIMIT_BYTES) for path in paths}) > 1:
            raise CheckpointError(
                f"{self.folder} holds positions of {part} on {len(paths)} ranks that differ, and cannot be divided "
                f"among {count}: load with as many ranks, or leave the dataloader out. A loader of "
                "booster.plugin.prepare_dataloader can be resumed with any number"
            )
        return paths[0]


def _load_dataloaders(found: Sequence[tuple[Part, Path, Any]]) -> None:
    """Hand each loader its state. If one does not take it, those before it have what they had.

    Of a single loader nothing is asked: for some (torchdata's) that starts their workers.
    """
    before = [(part.value, part.value.state_dict()) for part, _, _ in found] if len(found) > 1 else []
    for index, (part, path, state) in enumerate(found):
        try:
            part.value.load_state_dict(state)
        except Exception as error:  # a loader has rules of its own
            for loader, old in before[:index]:
                loader.load_state_dict(old)
            raise CheckpointError(f"{path} does not fit the {part}, nothing was changed: {error}") from error
