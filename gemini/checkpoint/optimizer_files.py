"""The files of a saved optimizer.

A folder holds the tensors in safetensors files and everything else in one JSON, which is also their index::

    optimizer.json          {"format": "gemini-memory optimizer", "version": 2, "optimizer": "Adam", "param_groups":
                             [{"lr": ..., "params": [0, 1], "param_names": ["wte.weight", null]}], "steps": {"0": 3},
                             "loss_scaler": {...}, "id": "5f0c...-7.0", "weight_map": {"0.exp_avg":
                             "optimizer.safetensors", ...}, "crc32": "0a1b2c3d"}       of all the rest; may be left out
    optimizer.safetensors   "0.exp_avg", "0.exp_avg_sq" and, for an optimizer of its own on half parameters, "0.master"

No pickle. The numbers are those of ``optimizer.state_dict()``: names of states and whether there are steps depend on
the optimizer. Version 1 was the same without ``optimizer``, which was always Adam.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gemini.chunk import copy_fault
from gemini.errors import CheckpointError
from gemini.nn.optimizer.rules.option_ranges import brief
from gemini.nn.optimizer.rules.rule import whole_steps

from ..formats import Damaged, listed, shown
from ..formats.json_file import check_checksum
from . import colossalai_optimizer
from .match import Source
from .safetensors_stream import OpenFiles
from .torch_file import read_torch, verify_torch
from .weight_files import checked_weight_map, read_indexed, read_json, read_sources

JSON_NAME = "optimizer.json"
TENSORS_NAME = "optimizer.safetensors"
FILE_NAME = "optimizer.pt"
"""Of ``torch.save``, in a checkpoint, for an optimizer that is not ours."""
FORMAT = "gemini-memory optimizer"
VERSION = 2
_KNOWN_VERSIONS = (1, 2)
_LONGEST_INDEX = 20
_SMALL_BYTES = 1 << 20
"""Whatever is stored of it, a tensor of this size does no harm."""


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
    if colossalai_optimizer.is_index(checkpoint):
        return _of_state_dict(checkpoint, colossalai_optimizer.read_state_dict(checkpoint), files)
    return _read_folder(checkpoint, files) if checkpoint.suffix == ".json" else _read_file(checkpoint, files)


def _read_folder(path: Path, files: OpenFiles) -> SavedOptimizer:
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the state of an optimizer")
    version = content.get("version")
    if type(version) is not int or version not in _KNOWN_VERSIONS:
        known = " and ".join(map(str, _KNOWN_VERSIONS))
        raise CheckpointError(f"{path} has version {brief(version)}; this package reads version {known}")
    try:
        check_checksum(path, content)
    except Damaged as error:
        raise CheckpointError(str(error)) from error
    files.says(path, content.get("id"))
    needed = ("param_groups", "steps", "loss_scaler", "weight_map", *(["optimizer"] if version > 1 else []))
    if lost := [name for name in needed if name not in content]:
        raise _fault(path, f"it lacks {', '.join(lost)}")
    groups = _groups(path, content["param_groups"])
    count = sum(len(group["params"]) for group in groups)
    if any(not 0 <= index < count for group in groups for index in group["params"]):
        raise _fault(path, f"its groups have parameters other than 0 to {count - 1}")
    states: dict[int, dict[str, Any]] = {
        index: {"step": steps} for index, steps in _steps(path, content["steps"], count).items()
    }
    for name, source in _sources(path, content["weight_map"], files).items():
        index, _, key = name.partition(".")
        states.setdefault(_index(path, index, count), {})[key] = source
    optimizer = "Adam" if version == 1 else content["optimizer"]
    if not isinstance(optimizer, str):
        raise _fault(path, f"its optimizer is {brief(optimizer)}, expected a name")
    groups = [{key: _from_json(key, value) for key, value in group.items()} for group in groups]
    return SavedOptimizer(groups, states, content["loss_scaler"], optimizer)


def _sources(path: Path, weight_map: Any, files: OpenFiles) -> dict[str, Source]:
    """The tensors that the JSON names. It names all that are in the files, as both have been written together."""
    homes = checked_weight_map(path, weight_map)
    first = path.with_name(path.name.removesuffix(JSON_NAME) + TENSORS_NAME)
    if not homes and first.is_file() and (others := read_sources(first, files)):
        raise _fault(path, f"it does not name what {first.name} has: {listed(others)}")
    return read_indexed(path, homes, files, names_all=True)


def _read_file(path: Path, files: OpenFiles) -> SavedOptimizer:
    stored = read_torch(path, verify=False)
    files.verify_later(partial(verify_torch, path))
    return _of_state_dict(path, stored, files)


def _of_state_dict(path: Path, stored: Any, files: OpenFiles) -> SavedOptimizer:
    """What the state dict of an optimizer says; ``path`` is where it was."""
    if not isinstance(stored, dict) or not isinstance(stored.get("state"), dict) or "param_groups" not in stored:
        raise CheckpointError(f"{path} does not hold the state dict of an optimizer")
    groups = _groups(path, stored["param_groups"])
    known = {index for group in groups for index in group["params"]}
    states: dict[int, dict[str, Any]] = {}
    for index, state in dict.items(stored["state"]):
        if type(index) is not int or index not in known:
            raise _fault(path, f"it has a state of {brief(index)}, which is no parameter of its groups")
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise _fault(path, f"the state of parameter {index} is {brief(state)}, expected names and values")
        if large := [
            name for name, value in state.items() if isinstance(value, Tensor) and _is_larger_than_stored(value)
        ]:
            raise _fault(path, f"{listed(large)} of parameter {index} would have more values than are stored")
        states[index] = {
            name: Source.of(value) if isinstance(value, Tensor) and name != "step" else value
            for name, value in dict.items(state)
            if value is not None
        }
    files.says(path, stored.get("id"))
    optimizer = stored.get("optimizer")
    return SavedOptimizer(groups, states, stored.get("loss_scaler"), optimizer if isinstance(optimizer, str) else None)


def _is_larger_than_stored(value: Any) -> bool:
    """True for a tensor of a few stored values that are repeated into many."""
    if not isinstance(value, Tensor) or copy_fault(value) is not None:
        return False
    return value.numel() * value.element_size() > max(value.untyped_storage().nbytes(), _SMALL_BYTES)


def _groups(path: Path, groups: Any) -> list[dict[str, Any]]:
    """The groups, each with its parameters' numbers, which are different ones, and their names if there are any."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise _fault(path, "its param_groups are no list of groups")
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    for number, group in enumerate(groups):
        params, names = group.get("params"), group.get("param_names")
        if not all(isinstance(key, str) for key in group):
            raise _fault(path, f"an option of group {number} has a name that is no text")
        if not isinstance(params, list | tuple) or not all(type(index) is int for index in params):
            raise _fault(path, f"the params of group {number} are {brief(params)}, expected numbers")
        if len(seen) + len(params) != len(seen := seen.union(params)):
            raise _fault(path, f"a parameter is twice in its groups (in group {number} for the second time)")
        if names is not None:
            if not isinstance(names, list) or not all(name is None or isinstance(name, str) for name in names):
                raise _fault(path, f"the param_names of group {number} are {brief(names)}, expected names")
            given = [name for name in names if name is not None]
            if len(names) != len(params) or len(set(given)) != len(given):
                raise _fault(path, f"the param_names of group {number} are not one for each of its parameters")
        found.append({**dict(dict.items(group)), "params": list(params)})
    return found


def _steps(path: Path, steps: Any, count: int) -> dict[int, int]:
    if not isinstance(steps, dict):
        raise _fault(path, f"its steps are {brief(steps)}, expected a number for each parameter")
    found = {}
    for index, value in steps.items():
        try:
            found[_index(path, index, count)] = whole_steps(value)
        except ValueError as error:
            raise _fault(path, f"parameter {shown(index)}: {error}") from error
    return found


def _index(path: Path, text: str, count: int) -> int:
    if len(text) < _LONGEST_INDEX and text.isdecimal() and text == str(int(text)) and int(text) < count:
        return int(text)
    raise _fault(path, f"it has the state of a parameter {shown(text)!r}, and parameters 0 to {count - 1}")


def _from_json(key: str, value: Any) -> Any:
    """JSON has no tuples; torch's options (betas, etas) are tuples."""
    return tuple(value) if isinstance(value, list) and key not in ("params", "param_names") else value


def _fault(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not the state of an optimizer: {what}")


def find_json(folder: Path) -> Path:
    if (folder / JSON_NAME).is_file():
        return folder / JSON_NAME
    found = sorted(path for path in folder.glob(f"*.{JSON_NAME}") if not path.name.startswith("."))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder} holds several optimizers: give one of {listed(found)}")
    if (index := colossalai_optimizer.find_index(folder)) is not None:
        return index
    raise CheckpointError(f"{folder} holds no optimizer: there is no {JSON_NAME}")
