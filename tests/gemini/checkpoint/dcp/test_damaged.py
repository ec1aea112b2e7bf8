"""Damaged checkpoints of `torch.distributed.checkpoint`: an error that names the file, and nothing has changed."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.checkpoint import dcp
from gemini.errors import CheckpointError
from gemini.nn.optimizer import HybridAdam

DATA = "__0_0.distcp"


def boosted(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
    booster.backward(model(torch.randn(4, 16)).square().mean(), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def everything(model: Any, optimizer: Any) -> list[Any]:
    state = optimizer.state_dict()
    tensors = [*model.state_dict().values(), *(v for s in state["state"].values() for v in s.values())]
    return [tensors, [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]]


def is_same(a: Any, b: Any) -> bool:
    return all(map(torch.equal, a[0], b[0])) and len(a[0]) == len(b[0]) and a[1] == b[1]


@pytest.fixture(scope="module")
def source() -> tuple[Any, Any]:
    return boosted(0)


@pytest.fixture(scope="module")
def target() -> tuple[Any, Any]:
    return boosted(1)


@pytest.fixture
def folder(source: tuple[Any, Any], tmp_path: Path) -> Path:
    dcp.save(tmp_path / "saved", *source)
    return tmp_path / "saved"


def refused(folder: Path, target: tuple[Any, Any], match: str, **options: Any) -> None:
    before = everything(*target)
    with pytest.raises(CheckpointError, match=match):
        dcp.load(folder, *target, **options)
    assert is_same(everything(*target), before)


def change_metadata(folder: Path, change: Callable[[Metadata], None], *, with_manifest: bool = False) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    if not with_manifest:
        (folder / "manifest.json").unlink()  # else it finds it first


def test_code_in_the_metadata_is_not_run(folder: Path, target: tuple[Any, Any], tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "called"),)

    (folder / "manifest.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Call()))
    refused(folder, target, r"saved/\.metadata is not the metadata .* it names posix.mkdir, which has no place there")
    assert not (tmp_path / "called").exists()


def test_code_among_the_values_is_not_run(source: Any, target: Any, folder: Path, tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "called"),)

    torch.save(Call(), tmp_path / "value")
    value = (tmp_path / "value").read_bytes()

    def put(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "optim.param_groups.0.lr":
                info.offset, info.length = (folder / DATA).stat().st_size, len(value)
        with open(folder / DATA, "ab") as file:
            file.write(value)

    change_metadata(folder, put)
    refused(folder, target, "optim.param_groups.0.lr is damaged, or holds more than plain values")
    assert not (tmp_path / "called").exists()


def test_files_outside_of_the_folder_are_not_read(folder: Path, target: tuple[Any, Any]) -> None:
    def point_outside(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = f"../saved/{DATA}"

    change_metadata(folder, point_outside)
    refused(folder, target, "it names a file outside of its folder")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.state_dict_metadata["model.0.weight"].chunks.clear(), "the parts of model.0.weight are not all"),
        (lambda m: m.storage_data.clear(), "is stored nowhere"),
        (lambda m: m.state_dict_metadata.pop("model.0.weight"), "missing .1.: 0.weight"),
        (lambda m: m.state_dict_metadata.pop("optim.state.0.weight.exp_avg"), "0.exp_avg is missing"),
        (
            lambda m: m.state_dict_metadata.pop("optim.param_groups.0.params"),
            "no whole state of an optimizer",
        ),
    ],
)
def test_what_is_missing_is_named(folder: Path, target: Any, change: Any, match: str) -> None:
    change_metadata(folder, change)
    refused(folder, target, match)


def test_a_part_that_overlaps_another_is_seen(tmp_path: Path, target: tuple[Any, Any], folder: Path) -> None:
    def twice(metadata: Metadata) -> None:
        stored = metadata.state_dict_metadata["model.0.weight"]
        (whole,) = stored.chunks  # type: ignore[union-attr]
        half = type(whole)(whole.offsets, torch.Size((8, 16)))
        stored.chunks[:] = [half, half]  # type: ignore[union-attr]

    change_metadata(folder, twice)
    refused(folder, target, "the stored parts of model.0.weight do not make up the tensor")


def test_other_shapes_are_refused(folder: Path) -> None:
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"2.weight: stored with shape \(4, 16\), the model has \(5, 16\)"):
        dcp.load(folder, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_options_that_cannot_be_are_refused(source: tuple[Any, Any], target: tuple[Any, Any], tmp_path: Path) -> None:
    model, optimizer = source
    optimizer.param_groups[0]["lr"] = float("nan")
    try:
        dcp.save(tmp_path / "saved", model, optimizer)
    finally:
        optimizer.param_groups[0]["lr"] = 1e-2
    refused(tmp_path / "saved", target, "lr")


@pytest.mark.parametrize("name", [DATA, ".metadata", "manifest.json"])
def test_no_flipped_bit_and_no_cut_goes_unnoticed(name: str, folder: Path, target: tuple[Any, Any]) -> None:
    data = (folder / name).read_bytes()
    rng = random.Random(0)
    for position in [rng.randrange(len(data)) for _ in range(20)]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(flipped)
        refused(folder, target, str(folder))
    (folder / name).write_bytes(data[: len(data) // 2])
    refused(folder, target, str(folder))
    (folder / name).unlink()
    if name != "manifest.json":  # without one nothing is known of checksums
        refused(folder, target, str(folder))


def test_without_a_manifest_what_is_damaged_is_refused_or_loaded_whole(folder: Path, target: tuple[Any, Any]) -> None:
    """As with other writers: nothing but an error of ours, whatever bytes there are."""
    (folder / "manifest.json").unlink()
    rng = random.Random(0)
    for name in (".metadata", DATA):
        data = (folder / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(damaged)
            try:
                dcp.load(folder, *target)
            except CheckpointError as error:
                assert str(folder) in str(error)
        (folder / name).write_bytes(data)


def test_the_manifest_says_what_is_there(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert sorted(manifest["files"]) == [".metadata", DATA]
    assert manifest["files"][DATA]["bytes"] == (folder / DATA).stat().st_size
