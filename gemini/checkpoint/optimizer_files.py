"""The files of a saved optimizer.

A folder holds the tensors in safetensors files and everything else in one JSON, which is also their index::

    optimizer.json          {"format": "gemini-memory optimizer", "version": 2, "optimizer": "Adam", "param_groups":
                             [{"lr": ..., "params": [0, 1], "param_names": ["wte.weight", null]}], "steps": {"0": 3},
                             "loss_scaler": {...}, "id": "5f0c...-7.0", "weight_map": {"0.exp_avg":
                             "optimizer.safetensors", ...}}
    optimizer.safetensors   "0.exp_avg", "0.exp_avg_sq" and, for an optimizer of its own on half parameters, "0.master"

No pickle. The numbers are those of ``optimizer.state_dict()``: names of states and whether there are steps depend on
the optimizer. Version 1 was the same without ``optimizer``, which was always Adam.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gemini.errors import CheckpointError

from .match import Source
from .safetensors_stream import OpenFiles
from .torch_file import read_torch
from .weight_files import checked_weight_map, read_indexed, read_json

JSON_NAME = "optimizer.json"
TENSORS_NAME = "optimizer.safetensors"
FILE_NAME = "optimizer.pt"
"""Of ``torch.save``, in a checkpoint, for an optimizer that is not ours."""
FORMAT = "gemini-memory optimizer"
VERSION = 2
_KNOWN_VERSIONS = (1, 2)


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """An optimizer's checkpoint, checked; tensors unread."""

    param_groups: list[dict[str, Any]]
    states: dict[int, dict[str, Any]]
    """By the index that ``params`` of the groups use: ``step`` as a number, tensors as `Source`."""
    loss_scaler: Mapping[str, Any] | None
    optimizer: str | None
    """The name of its rule; None where torch wrote it, which does not say."""


def read_optimizer(checkpoint: Path, files: OpenFiles) -> SavedOptimizer:
    """Read a folder's JSON, or a file of ``torch.save``; ``files`` takes what has to stay open.

    Raises
    ------
    CheckpointError
        If it is not whole, or not the state of an optimizer.
    """
    return _read_folder(checkpoint, files) if checkpoint.suffix == ".json" else _read_file(checkpoint, files)


def _read_folder(path: Path, files: OpenFiles) -> SavedOptimizer:
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the state of an optimizer")
    if content.get("version") not in _KNOWN_VERSIONS:
        known = " and ".join(map(str, _KNOWN_VERSIONS))
        raise CheckpointError(f"{path} has version {content.get('version')!r}; this package reads version {known}")
    files.says(path, content.get("id"))
    weight_map = checked_weight_map(path, content.get("weight_map"))
    sources = read_indexed(path, weight_map, files)
    try:
        states: dict[int, dict[str, Any]] = {int(i): {"step": float(n)} for i, n in content["steps"].items()}
        for name, source in sources.items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = source
        groups = [_group_from_json(group) for group in content["param_groups"]]
        name = "Adam" if content["version"] == 1 else str(content["optimizer"])
        return SavedOptimizer(groups, states, content["loss_scaler"], name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the state of an optimizer: {type(error).__name__} {error}") from error


def _read_file(path: Path, files: OpenFiles) -> SavedOptimizer:
    stored = read_torch(path, mmap=True)
    try:
        states = {
            int(i): {
                k: Source.of(v) if isinstance(v, Tensor) and k != "step" else v
                for k, v in state.items()
                if v is not None
            }
            for i, state in stored["state"].items()
        }
        groups = [{**group, "params": list(group["params"])} for group in stored["param_groups"]]
        files.says(path, stored.get("id"))
        return SavedOptimizer(groups, states, stored.get("loss_scaler"), stored.get("optimizer"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not hold the state dict of an optimizer") from error


def _group_from_json(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; torch's options (betas, etas) are tuples."""
    kept = ("params", "param_names")
    return {key: tuple(v) if isinstance(v, list) and key not in kept else v for key, v in group.items()} | {
        "params": list(group["params"])
    }


def find_json(folder: Path) -> Path:
    if (folder / JSON_NAME).is_file():
        return folder / JSON_NAME
    found = sorted(path for path in folder.glob(f"*.{JSON_NAME}") if not path.name.startswith("."))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder} holds several optimizers: give one of {', '.join(map(str, found))}")
    raise CheckpointError(f"{folder} holds no optimizer: there is no {JSON_NAME}")
