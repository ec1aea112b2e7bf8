"""The rule of placement, beside other ways to fill RAM, in the simulation of `scripts/bench placement`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from gemini.planning.step_time import Begin

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "placement.py"
MIB = 1 << 20
COMPARED_WITHIN = 1.003
"""Pieces of 16 MiB end where they end."""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_placement", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("stay", "begin"),
    [(1.0, Begin.AT_STEP), (1.0, Begin.WHEN_COMPLETE), (0.5, Begin.AT_STEP)],
    ids=["copies stay", "copies stay, updates in backward", "half of the copies stay"],
)
@pytest.mark.parametrize("homes", [106, 300, 600])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_no_other_way_to_fill_ram_gives_a_shorter_step(
    bench: ModuleType, tied: bool, homes: int, begin: Begin, stay: float
) -> None:
    numels = bench.chunk_numels(8, 768, 50257, tied)
    found = bench.compared(numels, homes * MIB, 1.25, 1.8e9, tied, begin, stay)
    rule = found.pop("rule")
    assert all(rule <= other * COMPARED_WITHIN for other in found.values()), found


def test_the_simulation_tells_placements_apart(bench: ModuleType) -> None:
    """With what is waited for first in RAM a step is a fifth shorter than with homes placed by kind and as wholes."""
    found = bench.compared(bench.chunk_numels(8, 768, 50257, True), 600 * MIB, 1.25, 1.8e9, True, Begin.WHEN_COMPLETE)
    assert found["rule"] < 0.8 * found["by kind, whole"]


def test_an_update_begins_in_backward_only_where_all_that_it_changes_is_on_disk(bench: ModuleType) -> None:
    numels = bench.chunk_numels(2, 64, 1000, True)
    on_disk = [dict(need.buffers) for need in bench.needs_of(numels)]
    on_disk[1]["exp_avg"] -= 8192
    on_disk[2]["gradient"] = 0
    assert bench.step_of(numels, on_disk, 1.0, True, Begin.WHEN_COMPLETE).order.early == set(range(len(numels))) - {1}


def test_what_is_on_disk_by_the_rule_is_what_ram_has_no_room_for(bench: ModuleType) -> None:
    needs = bench.needs_of(bench.chunk_numels(2, 64, 1000, True))
    homes = 300 << 10
    held, copies = sum(need.home_nbytes for need in needs), sum(need.full_nbytes for need in needs)
    on_disk = sum(sum(each.values()) for each in bench.by_rule(needs, homes, copies))
    assert held - homes <= on_disk < held - homes + 8192
