"""Leases as files: who holds them, who does no longer, and what is asked of their holders."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemini.lease.asked import Asked, as_text, from_text
from gemini.lease.folder import LeaseFolder
from gemini.lease.holder import own_standing

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from pathlib import Path
from gemini.lease.folder import LeaseFolder
from gemini.lease.holder import own_standing
lease = LeaseFolder(Path(sys.argv[1])).begin(own_standing("another", "a program", 0, 1))
print(lease.name, flush=True)
sys.stdin.read()
"""
LOOK = """
import sys
from pathlib import Path
from gemini.lease.folder import LeaseFolder
print(*LeaseFolder(Path(sys.argv[1])).standings())
"""


@pytest.fixture
def folder(tmp_path: Path) -> LeaseFolder:
    return LeaseFolder(tmp_path / "leases")


@contextmanager
def another(folder: LeaseFolder) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds a lease, and the lease's name."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    try:
        yield child, child.stdout.readline().strip()
    finally:
        child.kill()
        child.communicate(timeout=20)


def test_a_process_sees_its_own_lease_and_that_of_another(folder: LeaseFolder) -> None:
    lease = folder.begin(own_standing("mine", "me", 0, 1))
    with another(folder) as (child, name):
        found = folder.standings()
        assert found.keys() == {lease.name, name}
        assert found[name].job == "another"
        assert found[name].pid == child.pid
    lease.end()
    assert folder.standings() == {}


def test_what_a_killed_process_held_is_free_at_once_and_its_file_goes(folder: LeaseFolder) -> None:
    with another(folder) as (child, name):
        assert name in folder.standings()
        os.kill(child.pid, signal.SIGKILL)
        begin = time.monotonic()
        while name in folder.standings():
            assert time.monotonic() - begin < 1.0
    assert os.listdir(folder.path) == []


def test_looking_at_leases_does_not_drop_ones_own(folder: LeaseFolder) -> None:
    lease = folder.begin(own_standing("mine", "me", 0, 1))
    for _ in range(3):
        folder.standings()
    seen = subprocess.run(
        [sys.executable, "-c", LOOK, str(folder.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert seen.stdout.split() == [lease.name]
    lease.end()


def test_a_forked_child_neither_ends_the_lease_of_its_parent_nor_counts_it_twice(folder: LeaseFolder) -> None:
    lease = folder.begin(own_standing("mine", "me", 0, 1))
    child = os.fork()
    if child == 0:
        seen = folder.standings()
        lease.end()
        os._exit(0 if list(seen) == [lease.name] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (folder.path / f"{lease.name}.lease").exists()
    lease.end()


def test_files_are_private_and_links_are_not_followed(folder: LeaseFolder, tmp_path: Path) -> None:
    lease = folder.begin(own_standing("mine", "me", 0, 1))
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(folder.path / f"{lease.name}.lease").st_mode) == 0o600
    (tmp_path / "elsewhere").write_text("of the user")
    (folder.path / "1-a.lease").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder.path / "1-b.lease")
    (folder.path / "1-c.lease").mkdir()
    assert folder.standings().keys() == {lease.name}
    assert (tmp_path / "elsewhere").read_text() == "of the user"
    lease.end()


def test_a_folder_that_others_may_write_to_is_not_used(folder: LeaseFolder) -> None:
    folder.path.mkdir()
    folder.path.chmod(0o777)
    with pytest.raises(OSError, match="writable to nobody else"):
        folder.begin(own_standing("mine", "me", 0, 1))
    assert folder.standings() == {}


def test_a_file_that_nobody_holds_and_one_of_a_newer_version_count_as_nothing(folder: LeaseFolder) -> None:
    lease = folder.begin(own_standing("mine", "me", 0, 1))
    (folder.path / "2-dead.lease").write_text('{"v": 1}')
    with another(folder) as (_, name):
        (folder.path / f"{name}.lease").write_text(json.dumps({"v": 2, "job": "x"}))
        assert folder.standings().keys() == {lease.name}
    assert not (folder.path / "2-dead.lease").exists()
    lease.end()


def test_what_is_asked_is_taken_once_and_can_be_withdrawn(folder: LeaseFolder) -> None:
    lease = folder.begin(own_standing("mine", "me", 0, 1))
    assert lease.take_asked() is None
    asked = Asked.of(host=8 << 30)
    folder.ask(lease.name, as_text(Asked.of(host=1)))
    folder.ask(lease.name, as_text(asked))
    text = lease.take_asked()
    assert text is not None
    assert from_text(text) == asked
    assert asked.nbytes == {"host": 8 << 30}
    assert lease.take_asked() is None
    folder.ask(lease.name, as_text(asked))
    assert folder.withdraw(lease.name)
    assert not folder.withdraw(lease.name)
    assert from_text(b"{}") is None
    lease.end()
    assert os.listdir(folder.path) == []
