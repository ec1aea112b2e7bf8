"""Cores per rank, from affinities, quotas and files that stand for a machine's."""

import os
from pathlib import Path

import pytest

from gemini.cores import cpu_quota, share, usable_cores


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("mine", "parents", "quota", "ranks", "threads"),
    [
        (8, 8, None, 1, 8),
        (8, 8, None, 3, 2),
        (8, 8, None, 100, 1),
        (8, 64, None, 8, 8),  # the launcher bound this rank to cores of its own
        (64, 64, 4.0, 1, 4),  # docker --cpus=4
        (64, 64, 4.0, 2, 2),
        (64, 64, 0.5, 1, 1),
        (2, 2, 16.0, 1, 2),
        (8, 64, 16.0, 8, 2),
    ],
)
def test_a_rank_gets_its_share(mine: int, parents: int, quota: float | None, ranks: int, threads: int) -> None:
    assert share(mine, parents, quota, ranks) == threads


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            },
            1.5,
        ),
        # A container: the path is the host's, and its own group is the mount.
        ({"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n1:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
    ],
)
def test_the_quota_is_the_smallest_of_all_groups(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(machine(tmp_path, files)) == quota


def test_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert usable_cores(tmp_path) == 8
    for ranks, threads in [("2", 4), ("100", 1), ("0", 8), ("", 8)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert usable_cores(tmp_path) == threads
    for wrong in ("nonsense", "2.5", "0x2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", wrong)
        with pytest.raises(ValueError, match=f"LOCAL_WORLD_SIZE must be a whole number, got '{wrong}'"):
            usable_cores(tmp_path)


def test_a_process_bound_by_its_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64 if pid else 8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert usable_cores(tmp_path) == 8


def test_a_machine_without_affinities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert usable_cores(tmp_path) == os.cpu_count()
