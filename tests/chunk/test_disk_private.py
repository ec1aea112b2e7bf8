"""What is offloaded can be read by nobody else: model and optimizer are in there."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemini.chunk.disk_file import DiskFile, Requests
from gemini.chunk.disk_memory import DiskMemory


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize("nameless", [True, False])
def test_folder_and_file_are_private(
    nameless: bool, open_umask: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)  # as on file systems without it: EISDIR
    file = DiskFile(tmp_path / "offload")
    try:
        assert stat.S_IMODE((tmp_path / "offload").stat().st_mode) == 0o700
        assert stat.S_IMODE(os.fstat(file._fd).st_mode) == 0o600
        assert os.listdir(tmp_path / "offload") == []
    finally:
        file.close()


def test_what_is_remembered_of_a_disk_is_written_through_no_link(tmp_path: Path) -> None:
    memory, target = tmp_path / "memory", tmp_path / "precious"
    target.write_text("precious")
    known = DiskMemory(tmp_path, memory)
    memory.mkdir()
    for name in (known.path, known.path.with_suffix(".lock"), known.path.with_suffix(f".{os.getpid()}")):
        name.symlink_to(target)
    with known.alone():
        known.store(Requests(nbytes=1 << 20, depth=4))
    assert target.read_text() == "precious"
    assert known.load([Requests(nbytes=1 << 20, depth=4)]) is not None


@pytest.mark.timeout(30)
def test_what_is_remembered_of_a_disk_may_be_anything(tmp_path: Path) -> None:
    known = DiskMemory(tmp_path, tmp_path / "memory")
    known.path.parent.mkdir()
    os.mkfifo(known.path)
    assert known.load([Requests()]) is None
    known.path.unlink()
    with open(known.path, "wb") as file:
        file.truncate(1 << 34)
    assert known.load([Requests()]) is None
