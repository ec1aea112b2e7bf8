"""Benchmarks in a form that takes seconds: what they compare first is equal, and their tables say what was measured."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
MODEL = {"n_layer": 2, "n_embd": 64, "n_head": 1, "vocab_size": 128, "n_positions": 32}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of the folder, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    return importlib.import_module


def trained(bench: Any, manager: str, **options: Any) -> dict[str, Any]:
    answers: list[dict[str, Any]] = []
    asked = {"manager": manager, "options": options, "model": MODEL, "batch_size": 2, "length": 32}
    bench("offload_worker").serve(asked, answers.append, ["2"])
    assert "set_up_peak_bytes" in answers[0]
    return answers[1]


def test_ours_on_a_disk_and_plain_pytorch_train_with_the_same_losses(bench: Any, tmp_path: Path) -> None:
    plain = trained(bench, "plain")
    assert len(plain["losses"]) == 3 and len(plain["seconds"]) == 2 and plain["losses"][0] != plain["losses"][-1]
    on_disk = trained(bench, "ours", host_memory=2 * MIB, offload_dir=str(tmp_path))
    assert on_disk["losses"] == plain["losses"]


def test_each_row_is_asked_for_by_name_and_ours_means_all_budgets(bench: Any, tmp_path: Path) -> None:
    module = bench("offload_step")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    everything = parser.parse_args([])
    names = list(module.rows(everything, tmp_path))
    assert names == ["plain", "ours", "ours, 330MiB", "ours, 200MiB", "fsdp2 cpu", "zero3 cpu", "zero3 nvme"]
    some = parser.parse_args(["--only", "ours", "zero3 nvme", "--budgets", "1GiB"])
    found = module.rows(some, tmp_path)
    assert list(found) == ["ours", "ours, 1GiB", "zero3 nvme"]
    assert found["ours, 1GiB"].options["host_memory"] == "1GiB"
    assert found["zero3 nvme"].options["zero"]["offload_optimizer"]["device"] == "nvme"


def test_a_bound_is_computing_or_the_traffic_and_losses_that_differ_are_seen(bench: Any) -> None:
    module = bench("offload_step")
    turns = [{"seconds": [3.0, 5.0], "read_bytes": 3e9, "written_bytes": 1e9}] * 3
    assert module.of_bound(turns, [1e9, 2e9, 4e9], 0.5) == 2.0  # of the turn in the middle
    assert module.of_bound(turns, [1e9, 2e9, 4e9], 4.0) == 1.0
    assert module.of_bound(turns, [1e9, 2e9, 4e9], None) is None
    assert module.equal_losses({"a": [1.0, 2.0], "b": [1.0, 2.0]}) is True
    assert module.equal_losses({"a": [1.0, 2.0], "b": [1.0, 2.5]}) is False
    assert module.equal_losses({"a": [1.0]}) is None


def test_the_best_setting_is_found_by_changing_one_thing_after_the_other(bench: Any) -> None:
    nvme = bench("nvme")
    asked = []

    def seconds_of(setting: Mapping[str, Any]) -> float:
        asked.append(dict(setting))
        if setting["depth"] == 3:
            raise RuntimeError("this does not run")
        return 10.0 - setting["depth"] + (0 if setting["whole"] else 1)

    choices = {"depth": (1, 2, 3), "whole": (False, True)}
    assert nvme.best_setting({"depth": 1, "whole": False}, seconds_of, choices) == {"depth": 2, "whole": True}
    assert len(asked) == 4
    assert set(nvme.CHOICES) == set(nvme.BEST)


@pytest.mark.parametrize(("fit", "most"), [(0, 9), (1, 9), (5, 9), (8, 9), (9, 9), (20, 9), (100, 1000)])
def test_the_most_layers_are_found_by_halves(bench: Any, fit: int, most: int) -> None:
    tried: list[int] = []

    def trains(layers: int) -> bool:
        tried.append(layers)
        return layers <= fit

    assert bench("capacity").most_layers(trains, most) == min(fit, most)
    assert len(tried) == len(set(tried)) <= 16 and all(1 <= layers <= most for layers in tried)


def test_the_children_of_capacity_train_alike(bench: Any, tmp_path: Path) -> None:
    from gemini.train.model import GPTConfig

    child = bench("capacity_child")
    config = GPTConfig(layers=2, hidden=64, heads=1, seq_len=32)
    batches = [torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    torch.manual_seed(0)
    plain = child.plain(config, batches)
    torch.manual_seed(0)
    ours = child.managed(config, batches, {"folder": str(tmp_path), "disk_bytes": 64 * MIB})
    assert ours["losses"] == plain["losses"] and len(ours["step_seconds"]) == 2


def test_a_table_has_columns_of_one_width(bench: Any) -> None:
    rows = [{"run": "plain", "ms": "1"}, {"run": "ours, on a disk", "ms": "1234"}]
    lines = bench("report").table(rows).splitlines()
    assert lines[0].split() == ["run", "ms"] and len({len(line) for line in lines}) == 1
    assert lines[1].endswith("   1") and bench("report").table([]) == ""


def test_a_worker_that_ends_says_why(bench: Any, tmp_path: Path) -> None:
    module = bench("worker_process")
    code = "import sys; print('{}', flush=True); input(); sys.exit('no room')"
    worker = module.WorkerProcess([sys.executable, "-c", code], os.environ, tmp_path / "log")
    with pytest.raises(module.WorkerError, match="ended with 1: no room"):
        worker.ask()
    worker.close()


def script(*arguments: object) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench"), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(Path(str(arguments[-1])).read_text())
    return found


@pytest.mark.heavy
def test_the_whole_of_offload_step_in_small(tmp_path: Path) -> None:
    small = ("--layers", 2, "--hidden", 64, "--vocabulary", 128, "--seq-len", 32, "--steps", 1, "--repeats", 1)
    where = ("--disk", tmp_path, "--span", 32 * MIB, "--folder", tmp_path / "peers", "--budgets", "2MiB")
    found = script("offload_step", *small, *where, "--only", "plain", "ours", "fsdp2 cpu", "--json", tmp_path / "json")
    assert found["losses_equal"] and not found["errors"] and set(found["rows"]) >= {"plain", "ours, 2MiB", "fsdp2 cpu"}
    assert all(rate > 0 for rate in found["mixed_bytes_per_second"])


@pytest.mark.heavy
def test_the_largest_model_under_a_cap_is_larger_with_ours(tmp_path: Path) -> None:
    small = ("--hidden", 256, "--seq-len", 32, "--cap", "640MiB", "--most-layers", 48, "--disk-bytes", "2GiB")
    found = script("capacity", "--largest", *small, "--disk", tmp_path, "--json", tmp_path / "json")
    assert found["rows"]["ours"]["layers"] > found["rows"]["plain"]["layers"]
