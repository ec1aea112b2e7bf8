"""Homes on machines with several NUMA nodes: folders that stand for such a machine, and the real system call."""

from pathlib import Path

import pytest
import torch

from gemini.chunk import host_memory, numa


def machine(root: Path, nodes: dict[int, str], with_memory: str) -> Path:
    for number, cores in nodes.items():
        (root / f"node{number}").mkdir(parents=True)
        (root / f"node{number}" / "cpulist").write_text(cores + "\n")
    (root / "has_memory").write_text(with_memory + "\n")
    return root


def test_the_nodes_are_those_with_memory_on_whose_cores_the_process_may_run(tmp_path: Path) -> None:
    folder = machine(tmp_path, {0: "0-3,16-19", 1: "4-7,20-23", 2: "8-11", 3: ""}, "0-1,3")
    assert numa.nodes_of(range(24), folder) == {0, 1}
    assert numa.nodes_of({5, 21}, folder) == {1}
    assert numa.nodes_of({9}, folder) == set()
    assert numa.nodes_of({0}, tmp_path / "none") == set()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, frozenset[int]]]:
    calls: list[tuple[int, int, frozenset[int]]] = []
    monkeypatch.setattr(numa, "_mbind", lambda: lambda *arguments: calls.append(arguments))
    return calls


def test_homes_alternate_between_the_nodes_of_a_process_on_several(
    asked: list[tuple[int, int, frozenset[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "nodes_of_process", lambda: frozenset({0, 1}))
    home = host_memory.zeroed(1 << 20, torch.float32)
    ((start, nbytes, nodes),) = asked
    assert nodes == {0, 1}
    assert start % 4096 == nbytes % 4096 == 0
    begin, end = home.untyped_storage().data_ptr(), home.untyped_storage().data_ptr() + home.untyped_storage().nbytes()
    assert begin <= start < begin + 4096
    assert end - 4096 < start + nbytes <= end
    host_memory.zeroed(1, torch.float32)  # less than a page
    assert len(asked) == 1


def test_a_process_on_one_node_leaves_the_choice_to_the_system(
    asked: list[tuple[int, int, frozenset[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numa, "nodes_of_process", lambda: frozenset({1}))
    host_memory.zeroed(1 << 20, torch.float32)
    assert asked == []


def test_the_system_takes_the_call() -> None:
    call = numa._mbind()
    maps = Path("/proc/self/numa_maps")
    if call is None or not maps.exists():
        pytest.skip("this system has no NUMA policies")
    tensor = torch.zeros(8 << 20, dtype=torch.uint8)
    start, nbytes = host_memory.whole_pages(tensor)
    assert call(start, nbytes, {0}) == 0
    policy = next(line.split()[1] for line in maps.read_text().splitlines() if line.startswith(f"{start:x} "))
    assert policy == "interleave:0"
    assert not tensor.any()
