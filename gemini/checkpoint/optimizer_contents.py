"""The files that an optimizer is saved to: states as safetensors, one file or several, and all the rest as JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gemini.errors import CheckpointError
from gemini.nn.optimizer.managed import ManagedOptimizer
from gemini.nn.optimizer.rules.rule import Rule, steps_of

from ..formats.json_file import CHECKSUM, checksum_of
from .contents import Bytes, Content, Tensors, TorchFile, UnreadTensor
from .division import divided
from .names import InChunk
from .optimizer_files import FILE_NAME, FORMAT, JSON_NAME, TENSORS_NAME, VERSION
from .optimizer_view import loss_scaler, managed, names_of
from .pairs import id_metadata
from .safetensors_stream import ID_KEY, TensorRecord
from .tensor_parallel import refuse_parts
from .torch_file import plain
from .weight_files import shard_names


def optimizer_contents(optimizer: Optimizer, limit: int, writers: Sequence[int] = (0,)) -> list[Content]:
    """The files of an optimizer, unread.

    A single file of ``torch.save`` for one that is neither ours nor boosted, and for what JSON cannot hold (options and
    keys that hooks and users have added); all of it is in RAM then.

    Parameters
    ----------
    limit
        Bytes of tensors in one file, at most, unless a single tensor is larger.
    writers
        The ranks that write files.
    """
    refuse_parts(optimizer, "booster.save")
    if not isinstance(optimizer, ManagedOptimizer):
        return [_plain_file(optimizer)]
    try:
        states = States.of(optimizer, "", limit, Path(JSON_NAME), writers)
    except CheckpointError:
        return [_plain_file(optimizer)]
    names = [content.name for content in states.files]
    text = states.index(dict(zip(names, names, strict=True)))
    return [*states.files, Bytes(JSON_NAME, text.encode())]


def whole_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Everything, in RAM; torch ignores what it does not know."""
    state = optimizer.state_dict()
    scaler = loss_scaler(optimizer)
    if scaler is not None:
        state["loss_scaler"] = scaler.state_dict()
    if isinstance(optimizer, ManagedOptimizer):
        state |= {"optimizer": optimizer.rules.name, "id": id_metadata(optimizer).get(ID_KEY)}
    return state


def _plain_file(optimizer: Optimizer) -> Content:
    return TorchFile(FILE_NAME, plain(whole_state_dict(optimizer), "the state dict of the optimizer"))


@dataclass(frozen=True, slots=True)
class States:
    """The states of an optimizer as files."""

    files: tuple[Content, ...]
    homes: Mapping[str, str]
    """Name of a tensor -> its file."""
    options: Mapping[str, Any]
    """What the JSON says but for where the tensors are."""

    @classmethod
    def of(
        cls, optimizer: ManagedOptimizer, prefix: str, limit: int | None, path: Path, writers: Sequence[int]
    ) -> "States":
        """One file, or several where the states are larger than ``limit`` or several ranks write.

        ``path`` is named in errors.
        """
        options, found = _content(optimizer, path)
        sizes, shares = [each.record.nbytes for each in found], [each.shares for each in found]
        ranks, parts = zip(*divided(found, sizes, shares, writers, limit), strict=True)
        names = shard_names(prefix + TENSORS_NAME, len(parts)) if len(parts) > 1 else [prefix + TENSORS_NAME]
        homes = {each.record.name: file for file, part in zip(names, parts, strict=True) for each in part}
        metadata = {"format": "pt", **id_metadata(optimizer)}
        files = [Tensors(*each[:2], metadata, each[2]) for each in zip(names, parts, ranks, strict=True)]
        return cls(tuple(files), homes, options)

    def index(self, where: Mapping[str, str]) -> str:
        """The text of the JSON, with the path at which each file is found."""
        weight_map = {name: where[file] for name, file in self.homes.items()}
        whole = {**self.options, "weight_map": weight_map}
        return json.dumps({**whole, CHECKSUM: checksum_of(whole)}, indent=1) + "\n"


def _content(optimizer: ManagedOptimizer, path: Path) -> tuple[dict[str, Any], list[UnreadTensor]]:
    """What the JSON says but for where the tensors are, and the tensors."""
    scaler, parameters = loss_scaler(optimizer), _parameters(optimizer)
    steps: dict[int, int] = {}
    found: list[UnreadTensor] = []
    if optimizer.has_state_dict_post_hooks:
        saved, states = _hooked(optimizer, path)
        for index, state in states.items():
            rule = optimizer.rules.of(parameters[index])
            if rule.takes_step:
                steps[index] = steps_of(rule, state)
            found += [UnreadTensor(r, partial(_on_cpu, state, _key(r))) for r in _records(rule, index, state, path)]
    else:
        optimizer.before_state_dict()
        saved = [optimizer.saved_options(group) for group in optimizer.param_groups]
        for index, parameter in enumerate(parameters):
            if _has_state(optimizer, parameter):
                rule = optimizer.rules.of(parameter)
                if rule.takes_step:
                    steps[index] = _step_of(optimizer, parameter)
                records = _records(rule, index, _shown(optimizer, parameter), path)
                found += [_unread(optimizer, parameter, record) for record in records]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "optimizer": optimizer.rules.name,
        "param_groups": _groups(optimizer, saved, path),
        "steps": steps,
        "loss_scaler": scaler.state_dict() if scaler is not None else None,
        "id": id_metadata(optimizer).get(ID_KEY),
    }
    return content, found


def unread_state(optimizer: ManagedOptimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with an `UnreadTensor` in the place of each tensor that is in chunks.

    Hooks that come before a state dict is made are called; those that come after would have to see it read.
    """
    optimizer.before_state_dict()
    states: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        if not _is_kept(optimizer, parameter):
            if state := optimizer.exported_state(parameter):
                states[index] = dict(state)
        elif _has_state(optimizer, parameter):
            states[index] = {
                name: _unread(optimizer, parameter, TensorRecord(f"{index}.{name}", value.dtype, tuple(value.shape)))
                if name != "step"
                else _read(optimizer, parameter, name)
                for name, value in _shown(optimizer, parameter).items()
            }
    groups, count = [], 0
    for group in optimizer.param_groups:
        groups.append(optimizer.saved_options(group) | {"params": list(range(count, count + len(group["params"])))})
        count += len(group["params"])
    scaler = loss_scaler(optimizer)
    more: dict[str, Any] = {"optimizer": optimizer.rules.name, "id": id_metadata(optimizer).get(ID_KEY)}
    if scaler is not None:
        more["loss_scaler"] = scaler.state_dict()
    return {"state": states, "param_groups": groups, **more}


def _hooked(optimizer: ManagedOptimizer, path: Path) -> tuple[list[dict[str, Any]], dict[int, Mapping[str, Any]]]:
    """Groups and states after the hooks of users: they may make anything of a state dict, so there has to be one."""
    state_dict = optimizer.state_dict()
    others = [key for key in state_dict if key not in ("state", "param_groups")]
    others += [key for key in state_dict["state"] if not isinstance(key, int)]
    if others:
        raise CheckpointError(
            f"{path}: a folder has no place for {', '.join(map(repr, others))}, which a hook has put into the state "
            "dict; save to a .pt file instead"
        )
    return state_dict["param_groups"], state_dict["state"]


def _records(rule: Rule, index: int, state: Mapping[str, Any], path: Path) -> Iterator[TensorRecord]:
    for name, value in state.items():
        if isinstance(value, Tensor) and not (name == "step" and rule.takes_step):
            yield TensorRecord(f"{index}.{name}", value.dtype, tuple(value.shape))
        elif value is not None and name != "step":
            raise CheckpointError(
                f"{path}: {name!r} in the state of parameter {index} is a {type(value).__name__} and cannot be "
                "written; save to a .pt file instead"
            )


def _key(record: TensorRecord) -> str:
    return record.name.partition(".")[2]


def _shown(optimizer: ManagedOptimizer, parameter: Tensor) -> Mapping[str, Any]:
    """A state as state dicts have it; reads nothing of what is in chunks."""
    if _is_kept(optimizer, parameter):
        state: Mapping[str, Any] = optimizer.state[parameter]
        return state
    return optimizer.exported_state(parameter)


def _unread(optimizer: ManagedOptimizer, parameter: Tensor, record: TensorRecord) -> UnreadTensor:
    step, name = managed(optimizer), _key(record)
    kept = step.kept.values_of(parameter, name) if step is not None and step.kept.keeps(parameter) else ()
    in_chunks = tuple(InChunk(step.manager, parameter, each) for each in kept) if step is not None else ()
    read = partial(_read, optimizer, parameter, name)
    if step is None or not kept:
        return UnreadTensor(record, read)
    return UnreadTensor(record, read, in_chunks, step.kept.home(parameter, name).open)


def _read(optimizer: ManagedOptimizer, parameter: Tensor, name: str) -> Tensor:
    step = managed(optimizer)
    if step is not None and step.kept.keeps(parameter):
        value: Tensor = step.kept.copy(parameter, name)
        return value
    return _on_cpu(optimizer.exported_state(parameter), name)


def _on_cpu(state: Mapping[str, Any], name: str) -> Tensor:
    value: Tensor = state[name]
    return value.detach().cpu()


def _groups(optimizer: ManagedOptimizer, saved: Sequence[Mapping[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The groups as plain values; indices count through all groups, as in ``state_dict()``."""
    groups, count = [], 0
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        named = ("params", "param_names")
        plain = {key: _plain(value, key, path) for key, value in options.items() if key not in named}
        plain["params"] = list(range(count, count + len(group["params"])))
        plain["param_names"] = names_of(optimizer, group)
        groups.append(plain)
        count += len(group["params"])
    return groups


def _plain(value: Any, key: str, path: Path) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: option {key!r} of a parameter group is a {type(value).__name__} and cannot be written; "
            "save to a .pt file instead"
        ) from error
    return value


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_kept(optimizer: ManagedOptimizer, parameter: Tensor) -> bool:
    step = managed(optimizer)
    return step is not None and step.kept.keeps(parameter)


def _has_state(optimizer: ManagedOptimizer, parameter: Tensor) -> bool:
    return bool(optimizer.state.get(parameter))


def _step_of(optimizer: ManagedOptimizer, parameter: Tensor) -> int:
    """How many steps a parameter has taken."""
    step = managed(optimizer)
    if step is not None and step.kept.keeps(parameter):
        return step.kept.count(parameter)
    return steps_of(optimizer.rules.of(parameter), optimizer.state.get(parameter, {}))
