"""Files of `torch.distributed.checkpoint`: written with a checksum of each, and read without running code.

The format is torch's (``FileSystemWriter``), so that its tools read what is written here. What is added: every file is
counted and summed up while it is written, forced to the disk, and faults are told in our words.
"""

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gemini.errors import CheckpointError

from ...torch_private import stored_at
from ..output import Output
from ..raw import bytes_of
from .metadata import read_metadata


class SummedFiles(FileSystem):
    """A file system whose new files are counted and summed up.

    Parameters
    ----------
    final
        Where the files will end up, for messages.
    """

    def __init__(self, final: Path) -> None:
        self._final = final
        self.written: dict[str, tuple[int, int]] = {}
        """Length and CRC-32 of each file, by its name."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; a new one is forced to the disk at the end."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        path = Path(path)
        with Output(path, self._final / path.name) as out:
            file = _SummedFile(out)
            try:
                yield cast(io.IOBase, file)
            except BaseException:
                if out.fault is not None:
                    raise out.fault from None  # torch reports a wrong position in the file instead
                raise
        self.written[path.name] = file.tell(), file.crc

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file another name."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _SummedFile:
    """What torch needs of a file that it writes."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._nbytes = 0
        self.crc = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._out.write(view)
        self.crc = zlib.crc32(view, self.crc)
        self._nbytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self._nbytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass  # the caller closes the file that it has opened


class Writer(FileSystemWriter):
    """Writes one file for each rank into a folder, where nothing else is (a ``StorageWriter``).

    Parameters
    ----------
    folder
        Where the files are written.
    final
        Where they will end up.
    """

    def __init__(self, folder: Path, final: Path) -> None:
        super().__init__(folder, sync_files=False)  # ours are, by `Output`
        self.files = SummedFiles(final)
        self.fs = self.files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write one value after the other. (torch's own keeps all of them until the last one is written.)"""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results: list[WriteResult] = []
        with self.files.create_stream(Path(self.path, name), "wb") as stream:
            for item in plan.items:
                begin = stream.tell()
                _write(planner.resolve_data(item), stream)
                length = stream.tell() - begin
                results.append(WriteResult(item.index, length, stored_at(name, begin, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta:
        """What the metadata say of the place: nothing, because folders are moved."""
        return StorageMeta(save_id=self.save_id)


def _write(value: Tensor | io.BytesIO, stream: io.IOBase) -> None:
    if isinstance(value, io.BytesIO):
        stream.write(value.getbuffer())
        return
    value = value.detach().cpu().contiguous()
    part = value
    if value.numel() and value.untyped_storage().nbytes() != value.nbytes:
        # Its memory alone: else all that it is a part of would be written.
        part = torch.frombuffer(bytes_of(value), dtype=value.dtype).view(value.shape)
    torch.save(part, cast(Any, stream))


class Reader(FileSystemReader):
    """Reads a folder that we, or torch itself, have written (a ``StorageReader``).

    Parameters
    ----------
    folder
        Has the files and their ``.metadata``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._last: tuple[MetadataIndex, Tensor] | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is stored, and where. No code in it is run.

        Raises
        ------
        CheckpointError
            If it is damaged, or names what is not there.
        """
        return read_metadata(self._folder)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read in the order of the plan; of what is stored together, one part is in RAM at a time.

        Raises
        ------
        CheckpointError
            If a file is damaged.
        """
        with ExitStack() as files:
            opened: dict[str, io.BufferedReader] = {}
            for item in plan.items:
                info = self.storage_data[item.storage_index]
                path = self._folder / info.relative_path
                if info.relative_path not in opened:
                    opened[info.relative_path] = files.enter_context(open(path, "rb"))
                file = opened[info.relative_path]
                if item.type is LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(os.pread(file.fileno(), info.length, info.offset)))
                else:
                    self._read_tensor(item, planner, path, file)
            self._last = None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_tensor(self, item: ReadItem, planner: LoadPlanner, path: Path, file: io.BufferedReader) -> None:
        index = item.storage_index
        if self._last is None or self._last[0] != index:
            self._last = None  # before the next is read
            self._last = index, self._stored(index, path, file)
        part = self._last[1]
        for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, offset, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(part)
        planner.commit_tensor(item, target)

    def _stored(self, index: MetadataIndex, path: Path, file: io.BufferedReader) -> Tensor:
        view = cast(Any, self._slice_file(file, self.storage_data[index]))
        try:
            tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zip and pickle each have their own
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(f"{path} is damaged where {index.fqn} is: {reason}") from error
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            raise CheckpointError(f"{path} has something else than a tensor where {index.fqn} is")
        return tensor
