"""Saving and loading optimizer states. Masters of a boosted model are saved with the model."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gemini.chunk import MASTER
from gemini.errors import CheckpointError
from gemini.nn.optimizer.managed import ManagedOptimizer
from gemini.nn.optimizer.rules.rule import Rule, steps_of
from gemini.step.kept_states import KeptStates
from gemini.step.saved_groups import load_options

from ..formats.json_file import CHECKSUM, checksum_of
from .background import save
from .committed import newest
from .contents import Bytes, Content, Saving, Tensors, TorchFile, UnreadTensor
from .division import divided
from .filling import Filling
from .match import Source
from .names import InChunk
from .optimizer_check import check_signs, checked_saved, gathered, real
from .optimizer_files import (
    FILE_NAME,
    FORMAT,
    JSON_NAME,
    TENSORS_NAME,
    VERSION,
    SavedOptimizer,
    find_json,
    read_optimizer,
)
from .optimizer_view import loss_scaler, managed, names_of
from .pairs import Checked, check_pairs, id_metadata
from .ranks import checked_by_all, loaded_by_all
from .safetensors_stream import ID_KEY, OpenFiles, TensorRecord
from .stage import Stage
from .tensor_parallel import refuse_parts
from .torch_file import plain
from .weight_files import (
    FILE_SUFFIXES,
    checked_weight_map,
    find_shards,
    read_json,
    shard_names,
    size_limit,
)

# -- saving


def save_optimizer(
    optimizer: Optimizer,
    checkpoint: str | Path,
    *,
    shard: bool = False,
    prefix: str | None = None,
    size_per_shard: int | str = 1024,
    use_async: bool = False,
) -> None:
    """Write states, groups and loss scale.

    Hooks around ``state_dict()`` are called. Where one may change the state dict (a post-hook), all of it is gathered
    in RAM for it, also for a folder.

    Parameters
    ----------
    optimizer
        Boosted or not.
    checkpoint
        A name that ends in ``.pt``, ``.pth`` or ``.bin``: ``torch.save`` of the state dict, which
        ``torch.optim.AdamW`` loads as well; gathers everything in RAM. Anything else: a folder (it may be the model's),
        written one tensor at a time.
    shard
        Into a folder: cut the tensors into files of ``size_per_shard``.
    prefix
        Put before the names of the files, with a dot.
    size_per_shard
        MiB as a number, or ``"5GB"``.
    use_async
        Return at once and write while training goes on; see `gemini.checkpoint.background`.

    Raises
    ------
    CheckpointError
        If the files cannot be written, or a group has an option that is not a plain value.
    TypeError
        If a folder is given for an optimizer that neither is a `HybridAdam` nor came back from `boost`.
    ValueError
        If parameters are DTensors.
    """
    refuse_parts(optimizer, "save_optimizer")
    path = Path(checkpoint).absolute()
    if path.suffix in FILE_SUFFIXES and not path.is_dir():
        if shard or path.suffix == ".safetensors":
            raise ValueError(f"an optimizer is saved to a folder, or to one .pt, .pth or .bin file; got {str(path)!r}")
        save(optimizer, f"save_optimizer to {path}", partial(_file, optimizer, path), use_async)
        return
    if path.is_file():
        raise ValueError(f"{str(path)!r} is a file and not a folder; end the name in .pt, .pth or .bin")
    if not isinstance(optimizer, ManagedOptimizer):
        raise TypeError(
            "only a HybridAdam, or what booster.boost returned, is saved to a folder, got "
            f"{type(optimizer).__name__}; give a .pt file"
        )
    limit = size_limit(size_per_shard)
    listed = partial(_folder, optimizer, path, f"{prefix}." if prefix else "", limit if shard else None)
    save(optimizer, f"save_optimizer to {path}", listed, use_async)


def _file(optimizer: Optimizer, path: Path, writers: Sequence[int]) -> Saving:
    content = TorchFile(path.name, partial(_state_dict, optimizer))
    return Saving([content], path.parent, path.name, lambda stage: stage.commit([path.name]))


def _state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Everything, in RAM; torch ignores what it does not know."""
    state = optimizer.state_dict()
    scaler = loss_scaler(optimizer)
    if scaler is not None:
        state["loss_scaler"] = scaler.state_dict()
    if isinstance(optimizer, ManagedOptimizer):
        state |= {"optimizer": optimizer.rule.name, "id": id_metadata(optimizer).get(ID_KEY)}
    return state


def _folder(
    optimizer: ManagedOptimizer, folder: Path, prefix: str, limit: int | None, writers: Sequence[int]
) -> Saving:
    name = prefix + JSON_NAME
    states = _States.of(optimizer, prefix, limit, folder / name, writers)

    def commit(stage: Stage) -> None:
        with stage.alone():
            before = [*_files_of(folder / name), *find_shards(folder, prefix + TENSORS_NAME)]
            now = stage.commit_indexed([content.name for content in states.files], name, states.index)
            stage.discard(file for file in before if file not in now)

    return Saving(states.files, folder, name, commit)


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
        states = _States.of(optimizer, "", limit, Path(JSON_NAME), writers)
    except CheckpointError:
        return [_plain_file(optimizer)]
    names = [content.name for content in states.files]
    text = states.index(dict(zip(names, names, strict=True)))
    return [*states.files, Bytes(JSON_NAME, text.encode())]


def _plain_file(optimizer: Optimizer) -> Content:
    return TorchFile(FILE_NAME, plain(_state_dict(optimizer), "the state dict of the optimizer"))


@dataclass(frozen=True, slots=True)
class _States:
    """The states of an optimizer as files."""

    files: tuple[Content, ...]
    homes: Mapping[str, str]
    """Name of a tensor -> its file."""
    options: Mapping[str, Any]
    """What the JSON says but for where the tensors are."""

    @classmethod
    def of(
        cls, optimizer: ManagedOptimizer, prefix: str, limit: int | None, path: Path, writers: Sequence[int]
    ) -> "_States":
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
    rule, scaler = optimizer.rule, loss_scaler(optimizer)
    steps: dict[int, int] = {}
    found: list[UnreadTensor] = []
    if optimizer.has_state_dict_post_hooks:
        saved, states = _hooked(optimizer, path)
        for index, state in states.items():
            steps[index] = steps_of(rule, state)
            found += [UnreadTensor(r, partial(_on_cpu, state, _key(r))) for r in _records(rule, index, state, path)]
    else:
        optimizer.before_state_dict()
        saved = [optimizer.saved_options(group) for group in optimizer.param_groups]
        for index, parameter in enumerate(_parameters(optimizer)):
            if _has_state(optimizer, parameter):
                steps[index] = _step_of(optimizer, parameter)
                records = _records(rule, index, _shown(optimizer, parameter), path)
                found += [_unread(optimizer, parameter, record) for record in records]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "optimizer": rule.name,
        "param_groups": _groups(optimizer, saved, path),
        "steps": steps if rule.takes_step else {},
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
    more: dict[str, Any] = {"optimizer": optimizer.rule.name, "id": id_metadata(optimizer).get(ID_KEY)}
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
    return steps_of(optimizer.rule, optimizer.state.get(parameter, {}))


def _files_of(path: Path) -> Iterable[str]:
    """The files that the optimizer's JSON at ``path`` names, if there is one."""
    if not path.is_file():
        return []
    try:
        return list(dict.fromkeys(checked_weight_map(path, read_json(path).get("weight_map")).values()))
    except CheckpointError:
        return []  # what cannot be read names nothing


# -- loading


def load_optimizer(optimizer: Optimizer, checkpoint: str | Path, *, strict: bool = True, verify: bool = True) -> None:
    """Read what `save_optimizer` wrote, or a state dict of the torch optimizer that was boosted from a file.

    Parameters are found by name where both sides know all names, otherwise by position. Everything is checked before
    anything changes. Parameters that had not been stepped when the checkpoint was written lose their states. Hooks
    around ``load_state_dict()`` are called; for a pre-hook the whole checkpoint is read into RAM.

    Parameters
    ----------
    optimizer
        Boosted or not.
    checkpoint
        A folder, its JSON, or a file; or a folder of checkpoints of `booster.save`, of which the newest is taken.
    strict
        Whether it is an error if it was saved in another state of training than the model that has just been loaded.
    verify
        Whether to compare tensors with the checksums in their files, where these have any, before anything changes.

    Raises
    ------
    CheckpointError
        If the checkpoint is not whole or does not fit.
    ValueError
        If parameters are DTensors.
    """
    refuse_parts(optimizer, "load_optimizer")
    path = newest(Path(checkpoint), JSON_NAME)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if path.is_dir():
        path = find_json(path)
    doing = f"load_optimizer from {path}"
    with OpenFiles() as files:
        with checked_by_all(optimizer, doing):
            found = checked_optimizer(optimizer, path, files, strict=strict, verify=verify)
            check_pairs([found])
        with loaded_by_all(optimizer, doing):
            found.load()


def checked_optimizer(optimizer: Optimizer, path: Path, files: OpenFiles, *, strict: bool, verify: bool) -> Checked:
    """Check all that `load_optimizer` checks of one file, but for the model that it goes with.

    Parameters
    ----------
    files
        Takes what has to stay open until it is loaded; it holds nothing else.
    """
    saved = read_optimizer(path, files)
    id = files.id if strict else None
    if verify:
        files.verify()
    saved = checked_saved(optimizer, saved, path)
    check_signs(optimizer, saved, path)

    def assign() -> None:
        if isinstance(optimizer, ManagedOptimizer):
            _load(optimizer, saved)
            optimizer.after_load_state_dict()
        else:
            optimizer.load_state_dict({"state": gathered(saved.states), "param_groups": saved.param_groups})

    return Checked(optimizer, path, id, assign)


def _load(optimizer: ManagedOptimizer, saved: SavedOptimizer) -> None:
    filling = Filling()
    for group, of in zip(optimizer.param_groups, saved.param_groups, strict=True):
        # Names are those of the file, which may be the model's where nobody has given the optimizer any.
        load_options(group, {key: value for key, value in of.items() if key != "param_names"})
        for parameter, index in zip(group["params"], of["params"], strict=True):
            _load_state(optimizer, parameter, saved.states.get(index), filling)
    filling.run()
    scaler = loss_scaler(optimizer)
    if scaler is not None and saved.loss_scaler is not None:
        scaler.load_state_dict(saved.loss_scaler)


def _load_state(
    optimizer: ManagedOptimizer, parameter: Tensor, state: Mapping[str, Any] | None, filling: Filling
) -> None:
    step = managed(optimizer)
    if step is None or not step.kept.keeps(parameter):
        if state is None:
            optimizer.state.pop(parameter, None)
        else:
            optimizer.restore_state(parameter, {name: real(value) for name, value in state.items()})
    elif state is None:
        step.kept.drop(parameter)
    else:
        step.kept.replace(parameter, state, partial(_read_or_fill, step.kept, parameter, filling))


def _read_or_fill(kept: KeptStates, parameter: Tensor, filling: Filling, value: Any) -> Any:
    """A value, one at a time; None if it is taken to be filled in."""
    if isinstance(value, Source) and value.file is not None:
        name = value.name_in_file.partition(".")[2]
        if name != MASTER and filling.take(kept.home(parameter, name), value.file, value.name_in_file):
            return None
    return real(value)
