"""Files of a checkpoint before they are written: a name, a length, and how to read what goes in.

To list them is quick and reads no values: the training thread does it. Writing them may be left to another thread, or
divided among ranks; who does that replaces the readers, or takes some of the files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .flat_values import FlatValues
from .names import InChunk
from .output import Output
from .progress import Progress, Tell, unseen
from .safetensors_stream import SafetensorsWriter, TensorRecord
from .stage import Stage
from .torch_file import write_torch


class Content(Protocol):
    """One file that is to be written."""

    @property
    def name(self) -> str:
        """Its path in the checkpoint."""

    @property
    def nbytes(self) -> int:
        """Its length, to be reserved before the first byte; 0 if it is not known."""

    @property
    def rank(self) -> int:
        """Which of the ranks that keep the model together writes it."""

    def write(self, out: Output) -> None:
        """Write all of it."""


@dataclass(frozen=True, slots=True)
class UnreadTensor:
    """A tensor that is to be written."""

    record: TensorRecord
    read: Callable[[], Tensor]
    """Its value, on CPU."""
    in_chunks: tuple[InChunk, ...] = ()
    """What that is read from; empty if it is elsewhere."""
    open: Callable[[], FlatValues | None] = lambda: None
    """Its values where they are, for reading in parts; None where only `read` can have them."""

    @property
    def shares(self) -> list[int]:
        """How much of it each rank has at home; empty if it is not in chunks."""
        return shares_of(self.in_chunks)


@dataclass(frozen=True)
class Tensors:
    """A safetensors file."""

    name: str
    tensors: Sequence[UnreadTensor]
    metadata: Mapping[str, str]
    rank: int = 0

    @cached_property
    def _writer(self) -> SafetensorsWriter:
        return SafetensorsWriter([each.record for each in self.tensors], self.metadata)

    @property
    def nbytes(self) -> int:
        return self._writer.nbytes

    def write(self, out: Output) -> None:
        """In parts where that is possible, else one tensor at a time."""
        named = {each.record.name: each for each in self.tensors}
        self._writer.write(out, lambda name: named[name].read(), lambda name: named[name].open())


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A file of ``torch.save``."""

    name: str
    read: Callable[[], Any]
    nbytes: int = 0
    rank: int = 0

    def write(self, out: Output) -> None:
        write_torch(self.read(), out)


@dataclass(frozen=True, slots=True)
class Bytes:
    """A small file whose content is known."""

    name: str
    data: bytes
    nbytes: int = 0
    rank: int = 0

    def write(self, out: Output) -> None:
        out.write(self.data)


@dataclass(frozen=True, slots=True)
class Inside:
    """The same file in a folder of the checkpoint."""

    folder: str
    content: Content

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.content.name}"

    @property
    def nbytes(self) -> int:
        return self.content.nbytes

    @property
    def rank(self) -> int:
        return self.content.rank

    def write(self, out: Output) -> None:
        self.content.write(out)


@dataclass(frozen=True, slots=True)
class Saving:
    """Files that are listed, and what puts them in their places."""

    contents: Sequence[Content]
    folder: Path
    stage_name: str
    """As of `Stage`."""
    commit: Callable[[Stage], None]
    """Moves the files of a stage in which all of them are."""

    def run(self) -> None:
        """Write them now."""
        with Stage(self.folder, self.stage_name) as stage:
            write_all(stage, self.contents)
            self.commit(stage)


class Files(Protocol):
    """Makes new files: a `Stage`, or one of another rank."""

    def create(self, name: str, nbytes: int = 0, tell: Tell = unseen) -> Output:
        """A new file; ``nbytes`` are reserved at once. See `Output`."""


def write_all(stage: Files, contents: Iterable[Content]) -> None:
    """Write files into a stage, one after the other."""
    contents = list(contents)
    with Progress("saving", sum(content.nbytes for content in contents)) as progress:
        for content in contents:
            with stage.create(content.name, content.nbytes, progress.part(content.nbytes)) as out:
                content.write(out)


def shares_of(in_chunks: Iterable[InChunk]) -> list[int]:
    """Elements of values in chunks that each rank has at home."""
    found: list[int] = []
    for manager, parameter, _ in in_chunks:
        place = manager.find(parameter)
        assert place is not None
        parts = place[0].plan.place(place[1]).parts
        found = [a + len(part) for a, part in zip(found or [0] * len(parts), parts, strict=True)]
    return found
