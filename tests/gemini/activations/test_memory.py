"""Under a limit of the operating system, what a model saves need not fit into RAM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import UntypedStorage

from gemini.activations import room
from gemini.activations.disk import aligned


def trained(policy: str, folder: Path) -> str:
    return child("child_capped.py", policy, str(folder))


def child(name: str, *arguments: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / name), *arguments],
        capture_output=True, text=True, timeout=250, env=clean,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.heavy
def test_saved_tensors_of_twice_the_limit_are_trained_where_they_may_leave(tmp_path: Path) -> None:
    assert trained("keep", tmp_path) == "OutOfMemory"
    assert float(trained("offload", tmp_path)) > 0


@pytest.mark.heavy
def test_a_batch_whose_backward_runs_out_of_memory_fits_the_next_time(tmp_path: Path) -> None:
    ends = {}
    for limit in ("limited", "free"):
        *failures, ends[limit] = child("child_short_in_backward.py", str(tmp_path), limit).splitlines()
        assert set(failures) == ({"OutOfMemory"} if limit == "limited" else set())
        assert len(failures) <= 2  # each failure has the next forward keep less
    digests = {end.split()[0] for end in ends.values()}
    assert len(digests) == 1
    assert ends["limited"].endswith("True")


def test_the_link_is_measured_with_less_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def short(nbytes: int, skip: int) -> UntypedStorage:
        asked.append(nbytes)
        if nbytes > 4 << 20:
            raise MemoryError
        return aligned(nbytes, skip)

    monkeypatch.setattr(room, "aligned", short)
    assert room.disk_link(tmp_path, 1).up_bytes_per_second > 0
    assert asked == [16 << 20, 8 << 20, 4 << 20]
