"""A sample of a grid: one in some of its cases, and each value of each argument."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sampled import sampled


def kept(cases: Sequence[tuple[Any, ...]], n: int, by: int | None = None, start: int = 0) -> list[Any]:
    named = [{str(index): value for index, value in enumerate(case)} for case in cases]
    keep = sampled(named, n, None if by is None else str(by), start)
    return [case for case, is_kept in zip(cases, keep, strict=True) if is_kept]


SHAPES = [(1, 1), (2, 2), (21, 10, 3), (300, 3), (3, 300), (2, 2, 2), (40, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_value_of_a_grid_is_in_its_sample(shape: tuple[int, ...]) -> None:
    cases = list(itertools.product(*(range(length) for length in shape)))
    for n, start in itertools.product(range(1, 8), (0, 1, 1_000_003)):
        sample = kept(cases, n, start=start)
        assert [set(values) for values in zip(*sample, strict=True)] == [set(range(length)) for length in shape]
        assert len(sample) <= len(cases) / n + sum(shape)
    assert kept(cases, 1) == cases


def test_a_large_grid_is_sampled_evenly() -> None:
    sample = kept(list(itertools.product(range(300), ["tight", "disk", "roomy"])), 3)
    assert len({name for name, _ in sample}) == len(sample) == 300
    assert [sum(place == each for _, place in sample) for each in ("tight", "disk", "roomy")] == [100] * 3


def test_each_name_of_a_ragged_grid_is_in_its_sample() -> None:
    cases = [(name, place) for name in range(60) for place in range(3) if place == 0 or name % 4 == 1]
    sample = kept(cases, 3)
    assert {name for name, _ in sample} == set(range(60))
    assert {place for _, place in sample} == {0, 1, 2}


def test_of_a_list_every_third_is_in_its_sample() -> None:
    assert kept([(seed,) for seed in range(10)], 3) == [(0,), (3,), (6,), (9,)]
    assert kept([(seed,) for seed in range(10)], 3, start=5) == [(2,), (5,), (8,)]


@pytest.mark.parametrize("length", range(1, 5))
def test_of_a_list_there_is_always_one_in_its_sample(length: int) -> None:
    lists = [(seed,) for seed in range(length)]
    assert {len(kept(lists, 4, start=start)) for start in range(9)} == {1}
    assert {case for start in range(9) for case in kept(lists, 4, start=start)} == set(lists)


def test_next_to_each_value_of_a_named_argument_there_is_a_list() -> None:
    cases = [(name, place) for name in range(8) for place in ("disk", "tight") if place == "disk" or name > 3]
    assert kept(cases, 3, by=1) == [(0, "disk"), (3, "disk"), (4, "tight"), (6, "disk"), (7, "tight")]


def test_arguments_that_go_together_are_a_list_and_one_that_never_changes_is_none() -> None:
    assert kept([(seed, "streamed") for seed in range(10)], 3) == [(seed, "streamed") for seed in (0, 3, 6, 9)]
    assert kept([("a", {"x": 1}), ("b", {"x": 2}), ("c", {"x": 3})], 2) == [("a", {"x": 1}), ("c", {"x": 3})]


def test_values_need_not_be_hashable() -> None:
    options: list[dict[str, int]] = [{}, {"x": 1}]
    cases = [(option, flag) for option in options for flag in (False, True)]
    assert kept(cases, 2) == [({}, False), ({"x": 1}, True)]


COLLECTED = """
import pytest

pytestmark = pytest.mark.one_in(2)

@pytest.fixture(params=["host", "disk"])
def place(request): return request.param

@pytest.mark.parametrize("name", ["a", "b"])
def test_grid(name, place): pass

@pytest.mark.parametrize("name", ["a", pytest.param("b", marks=pytest.mark.heavy), "c", "d"])
def test_list(name): pass

@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", ["a", "b"])
def test_whole(name): pass

def test_single(): pass
"""


def test_what_is_marked_is_heavy_or_runs_whatever_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from sampled import pytest_pycollect_makeitem\n")
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\nmarkers =\n  heavy\n  one_in\npythonpath = {Path(__file__).parent}\n"
    )
    (tmp_path / "test_it.py").write_text(COLLECTED)

    def collected(*arguments: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return {line.split("::")[1] for line in done.stdout.splitlines() if "::" in line}

    light, heavy = collected("-m", "not heavy"), collected("-m", "heavy")
    assert collected() == light | heavy and not light & heavy
    assert {"test_whole[a]", "test_whole[b]", "test_single"} < light
    grids = [{"test_grid[host-a]", "test_grid[disk-b]"}, {"test_grid[host-b]", "test_grid[disk-a]"}]
    assert light & (grids[0] | grids[1]) in grids
    assert "test_list[b]" in heavy  # it is of itself, and counts for nothing
    assert {name for name in light if "list" in name} in ({"test_list[a]", "test_list[d]"}, {"test_list[c]"})
    for name in ("test_list[a]", "test_list[c]"):  # alone, too
        assert collected("-m", "heavy", f"test_it.py::{name}") == {name} & heavy
