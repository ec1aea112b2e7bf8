"""Optimizers as ColossalAI saves them with ``shard=True``.

::

    pytorch_optim.bin.index.json   {"metadata": {"param_groups": "pytorch_optim_group.bin", ...},
                                    "weight_map": {"0": "pytorch_optim-00001.bin", ...}}
    pytorch_optim_group.bin        the groups, as ``optimizer.state_dict()`` has them
    pytorch_optim-00001.bin        {0: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}, ...}

With a prefix, ColossalAI puts it before the last dot: ``pytorch_optim.bin.index.PREFIX.json``.
"""

from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError

from ..formats import listed
from .torch_file import read_torch
from .weight_files import checked_weight_map, read_json

_INDEX_BEGINS, _INDEX_ENDS = "pytorch_optim.bin.index.", "json"


def is_index(path: Path) -> bool:
    """True for the name of such an index."""
    return path.name.startswith(_INDEX_BEGINS) and path.name.endswith(_INDEX_ENDS)


def find_index(folder: Path) -> Path | None:
    """The one index of a folder; None if there is none, or several."""
    found = [path for path in folder.glob(f"{_INDEX_BEGINS}*") if is_index(path)]
    return found[0] if len(found) == 1 else None


def read_state_dict(index: Path) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would have been; tensors stay in their files until they are used.

    Raises
    ------
    CheckpointError
        If a file is missing or not what it should be.
    """
    content = read_json(index)
    metadata = content.get("metadata")
    groups_file = metadata.get("param_groups") if isinstance(metadata, dict) else None
    weight_map = checked_weight_map(index, content.get("weight_map"))
    # The file of the groups is named as those of the states are, and may as little lie elsewhere.
    checked_weight_map(index, {"param_groups": groups_file})
    states: dict[int, Any] = {}
    for file in sorted(set(weight_map.values())):
        found = read_torch(_there(index, file))
        if not isinstance(found, dict) or not all(type(number) is int for number in found):
            raise CheckpointError(f"{index.parent / file} does not hold states by the numbers of parameters")
        states.update(found)
    if lost := [number for number in weight_map if not number.isdecimal() or int(number) not in states]:
        raise CheckpointError(f"{index} names states that are not in their files: {listed(lost)}")
    return {"param_groups": read_torch(_there(index, str(groups_file))), "state": states}


def _there(index: Path, file: str) -> Path:
    path = index.parent / file
    if not path.is_file():
        raise CheckpointError(f"{index} names a file that does not exist: {file}")
    return path
