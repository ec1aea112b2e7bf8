"""Saving and loading optimizer states. Masters of a boosted model are saved with the model."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gemini.errors import CheckpointError
from gemini.nn.optimizer.acceptance import rule_name
from gemini.nn.optimizer.managed import ManagedOptimizer
from gemini.nn.optimizer.rules.rule import Rule, steps_of
from gemini.step.managed_step import ChunkedStep
from gemini.step.saved_groups import check_groups, load_options

from .background import save
from .committed import newest
from .contents import Bytes, Content, Saving, Tensors, TorchFile, UnreadTensor, write_all
from .match import Source
from .names import InChunk
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
    into_shards,
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


def _file(optimizer: Optimizer, path: Path) -> Saving:
    def write(contents: Sequence[Content]) -> None:
        with Stage(path.parent, path.name) as stage:
            write_all(stage, contents)
            stage.commit([path.name])

    return Saving([TorchFile(path.name, partial(_state_dict, optimizer))], write)


def _state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Everything, in RAM; torch ignores what it does not know."""
    state = optimizer.state_dict()
    scaler = _loss_scaler(optimizer)
    if scaler is not None:
        state["loss_scaler"] = scaler.state_dict()
    if isinstance(optimizer, ManagedOptimizer):
        state |= {"optimizer": optimizer.rule.name, "id": id_metadata(optimizer).get(ID_KEY)}
    return state


def _folder(optimizer: ManagedOptimizer, folder: Path, prefix: str, limit: int | None) -> Saving:
    name = prefix + JSON_NAME
    states = _States.of(optimizer, prefix, limit, folder / name)

    def write(contents: Sequence[Content]) -> None:
        with Stage(folder, name) as stage:
            write_all(stage, contents)
            with stage.alone():
                before = [*_files_of(folder / name), *find_shards(folder, prefix + TENSORS_NAME)]
                stage.commit_indexed([content.name for content in contents], name, states.index)
                now = _files_of(folder / name)
                stage.discard(file for file in before if file not in now)

    return Saving(states.files, write)


def optimizer_contents(optimizer: Optimizer, limit: int) -> list[Content]:
    """The files of an optimizer, unread.

    A single file of ``torch.save`` for one that is neither ours nor boosted, and for what JSON cannot hold (options and
    keys that hooks and users have added); all of it is in RAM then.

    Parameters
    ----------
    limit
        Bytes of tensors in one file, at most, unless a single tensor is larger.
    """
    refuse_parts(optimizer, "booster.save")
    if not isinstance(optimizer, ManagedOptimizer):
        return [_plain_file(optimizer)]
    try:
        states = _States.of(optimizer, "", limit, Path(JSON_NAME))
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
    def of(cls, optimizer: ManagedOptimizer, prefix: str, limit: int | None, path: Path) -> "_States":
        """One file, or several where the states are larger than ``limit``; ``path`` is named in errors."""
        options, found = _content(optimizer, path)
        sizes = [each.record.nbytes for each in found]
        parts = into_shards(found, sizes, limit) if limit is not None and found else [found]
        names = shard_names(prefix + TENSORS_NAME, len(parts)) if len(parts) > 1 else [prefix + TENSORS_NAME]
        homes = {each.record.name: file for file, part in zip(names, parts, strict=True) for each in part}
        metadata = {"format": "pt", **id_metadata(optimizer)}
        files = [Tensors(file, part, metadata) for file, part in zip(names, parts, strict=True)]
        return cls(tuple(files), homes, options)

    def index(self, where: Mapping[str, str]) -> str:
        """The text of the JSON, with the path at which each file is found."""
        weight_map = {name: where[file] for name, file in self.homes.items()}
        return json.dumps({**self.options, "weight_map": weight_map}, indent=1) + "\n"


def _content(optimizer: ManagedOptimizer, path: Path) -> tuple[dict[str, Any], list[UnreadTensor]]:
    """What the JSON says but for where the tensors are, and the tensors."""
    rule, scaler = optimizer.rule, _loss_scaler(optimizer)
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
    step, name = _managed(optimizer), _key(record)
    kept = step.kept.values_of(parameter, name) if step is not None and step.kept.keeps(parameter) else ()
    in_chunks = tuple(InChunk(step.manager, parameter, each) for each in kept) if step is not None else ()
    return UnreadTensor(record, partial(_read, optimizer, parameter, name), in_chunks)


def _read(optimizer: ManagedOptimizer, parameter: Tensor, name: str) -> Tensor:
    step = _managed(optimizer)
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
        plain["param_names"] = _names(optimizer, group)
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

    def assign() -> None:
        if isinstance(optimizer, ManagedOptimizer):
            _load(optimizer, saved)
            optimizer.after_load_state_dict()
        else:
            optimizer.load_state_dict({"state": _gathered(saved.states), "param_groups": saved.param_groups})

    return Checked(optimizer, path, id, assign)


def checked_saved(optimizer: Optimizer, saved: SavedOptimizer, path: Path) -> SavedOptimizer:
    """What is to be loaded, in our order, as the hooks of users would have it."""
    name = rule_name(optimizer)
    if None not in (name, saved.optimizer) and name != saved.optimizer:
        raise CheckpointError(
            f"{path} has the state of {saved.optimizer}, which {name} cannot go on with; the optimizer is as it was"
        )
    if not isinstance(optimizer, ManagedOptimizer):
        return saved
    if optimizer.has_load_state_dict_pre_hooks:
        saved = _prepared_by_hooks(optimizer, saved, path)
    saved = _in_our_order(optimizer, saved, path)
    try:
        step = _managed(optimizer)
        check_groups(optimizer, saved.param_groups, saved.states, step.kept.room(optimizer) if step is not None else {})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    _check_states(optimizer, saved, path)
    return saved


def _prepared_by_hooks(optimizer: ManagedOptimizer, saved: SavedOptimizer, path: Path) -> SavedOptimizer:
    """What the hooks of users make of a checkpoint. They may look at all of it, so it has to be in RAM."""
    state_dict = {"state": _gathered(saved.states), "param_groups": saved.param_groups}
    changed = optimizer.before_load_state_dict(state_dict)
    try:
        states, groups = changed["state"], changed["param_groups"]
        return replace(saved, states={i: _sources(state) for i, state in states.items()}, param_groups=list(groups))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: a hook made something else than a state dict of it ({error!r})") from error


def _load(optimizer: ManagedOptimizer, saved: SavedOptimizer) -> None:
    for group, of in zip(optimizer.param_groups, saved.param_groups, strict=True):
        # Names are those of the file, which may be the model's where nobody has given the optimizer any.
        load_options(group, {key: value for key, value in of.items() if key != "param_names"})
        for parameter, index in zip(group["params"], of["params"], strict=True):
            _load_state(optimizer, parameter, saved.states.get(index))
    scaler = _loss_scaler(optimizer)
    if scaler is not None and saved.loss_scaler is not None:
        scaler.load_state_dict(saved.loss_scaler)


def _load_state(optimizer: ManagedOptimizer, parameter: Tensor, state: Mapping[str, Any] | None) -> None:
    step = _managed(optimizer)
    if step is None or not step.kept.keeps(parameter):
        if state is None:
            optimizer.state.pop(parameter, None)
        else:
            optimizer.restore_state(parameter, _tensors(state))
    elif state is None:
        step.kept.drop(parameter)
    else:
        step.kept.replace(parameter, state, read=_real)  # one at a time


def _in_our_order(optimizer: ManagedOptimizer, saved: SavedOptimizer, path: Path) -> SavedOptimizer:
    """Order each saved group as ours: by name where all names are known on both sides, else names must agree."""
    ours = [
        _names_like(group, optimizer, of) for group, of in zip(optimizer.param_groups, saved.param_groups, strict=False)
    ]
    theirs = [group.get("param_names") or [None] * len(group["params"]) for group in saved.param_groups]
    if [len(g["params"]) for g in optimizer.param_groups] != [len(names) for names in theirs]:
        return saved  # the numbers of parameters are compared later
    by_name = not any(name is None for names in (*ours, *theirs) for name in names)
    groups, faults = [], []
    for i, (mine, other, group) in enumerate(zip(ours, theirs, saved.param_groups, strict=True)):
        if by_name:
            faults += [f"{name} is missing from group {i}" for name in mine if name not in other]
            faults += [f"{name} is unexpected in group {i}" for name in other if name not in mine]
            place = dict(zip(other, group["params"], strict=True))
            groups.append({**group, "params": [place.get(name) for name in mine]})
        else:
            pairs = zip(mine, other, strict=True)
            faults += [f"{b} in group {i} is in the place of {a}" for a, b in pairs if a and b and a != b]
            groups.append(group)
    if faults:
        raise CheckpointError(f"{path} does not fit the optimizer, which is as it was: {'; '.join(faults)}")
    return replace(saved, param_groups=groups)


def _check_states(optimizer: ManagedOptimizer, saved: SavedOptimizer, path: Path) -> None:
    faults = []
    for group, of in zip(optimizer.param_groups, saved.param_groups, strict=True):
        for parameter, index in zip(group["params"], of["params"], strict=True):
            state = saved.states.get(index)
            if state is None:
                continue
            if optimizer.rule.takes_step and "step" not in state:
                faults.append(f"{index}.step is missing")
            master = state.get("master")
            if master is not None and master.shape != tuple(parameter.shape):
                faults.append(f"{index}.master: stored with shape {master.shape}, expected {tuple(parameter.shape)}")
            step = _managed(optimizer)
            place = step.manager.find(parameter) if step is not None else None
            if place is not None and not place[0].is_trainable:
                faults.append(f"{index} ({place[0].layout.slots[place[1]].name}) is frozen here and has a state there")
    if faults:
        raise CheckpointError(f"{path} does not fit the optimizer, which is as it was: {'; '.join(faults)}")


# -- both


def _managed(optimizer: Optimizer) -> ChunkedStep | None:
    step = getattr(optimizer, "_managed", None)
    return step if isinstance(step, ChunkedStep) else None


def _loss_scaler(optimizer: Optimizer) -> Any:
    step = _managed(optimizer)
    return step.scaling.scaler if step is not None else None


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_kept(optimizer: ManagedOptimizer, parameter: Tensor) -> bool:
    step = _managed(optimizer)
    return step is not None and step.kept.keeps(parameter)


def _has_state(optimizer: ManagedOptimizer, parameter: Tensor) -> bool:
    return bool(optimizer.state.get(parameter))


def _step_of(optimizer: ManagedOptimizer, parameter: Tensor) -> int:
    """How many steps a parameter has taken."""
    step = _managed(optimizer)
    if step is not None and step.kept.keeps(parameter):
        return step.kept.count(parameter)
    return steps_of(optimizer.rule, optimizer.state.get(parameter, {}))


def _names(optimizer: ManagedOptimizer, group: Mapping[str, Any]) -> Sequence[str | None]:
    """Full names in the model; None where nobody knows them."""
    step = _managed(optimizer)
    given: Sequence[str | None] = group.get("param_names") or [None] * len(group["params"])
    if step is None:
        return list(given)
    known = (step.manager.slot(p).name if step.manager.find(p) is not None else None for p in group["params"])
    return [name or other for name, other in zip(known, given, strict=True)]


def _names_like(
    group: Mapping[str, Any], optimizer: ManagedOptimizer, saved: Mapping[str, Any]
) -> Sequence[str | None]:
    """The names of a group; the optimizer's own `param_names` where a saved group has the same."""
    given: Sequence[str] = group.get("param_names") or ()
    if given and set(given) == set(saved.get("param_names") or ()):
        return list(given)
    return _names(optimizer, group)


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _real(value) for key, value in state.items()}


def _real(value: Any) -> Any:
    return value.read() if isinstance(value, Source) else value


def _sources(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: Source.of(v) if isinstance(v, Tensor) and k != "step" else v for k, v in state.items()}


def _gathered(states: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    found = {index: _tensors(state) for index, state in states.items()}
    for state in found.values():
        if "step" in state:
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu")
    return found


def _files_of(path: Path) -> Iterable[str]:
    """The files that the optimizer's JSON at ``path`` names, if there is one."""
    if not path.is_file():
        return []
    try:
        return list(dict.fromkeys(checked_weight_map(path, read_json(path).get("weight_map")).values()))
    except CheckpointError:
        return []  # what cannot be read names nothing
