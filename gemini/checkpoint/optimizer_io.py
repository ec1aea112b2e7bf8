"""Saving and loading optimizer states. Masters of a boosted model are saved with the model."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gemini.chunk import MASTER
from gemini.errors import CheckpointError
from gemini.nn.optimizer.managed import ManagedOptimizer
from gemini.step.kept_states import KeptStates
from gemini.step.saved_groups import load_options

from .background import save
from .committed import newest, refuse_committed
from .contents import Saving, TorchFile
from .filling import Filling
from .match import Source
from .optimizer_check import check_options, check_signs, checked_saved, gathered, real
from .optimizer_contents import States, whole_state_dict
from .optimizer_files import (
    JSON_NAME,
    TENSORS_NAME,
    SavedOptimizer,
    find_json,
    read_optimizer,
)
from .optimizer_view import loss_scaler, managed
from .pairs import Checked, check_pairs
from .ranks import checked_by_all, loaded_by_all, wait_for_saves
from .safetensors_stream import OpenFiles
from .stage import Stage
from .tensor_parallel import refuse_parts
from .weight_files import (
    FILE_SUFFIXES,
    checked_weight_map,
    find_shards,
    read_json,
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
        A name that ends in ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``: ``torch.save`` of the state dict, which
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
        If the files cannot be written, or a group has an option that is not a plain value, or one that a load would
        refuse, such as an ``lr`` of NaN.
    TypeError
        If a folder is given for an optimizer that neither is a `HybridAdam` nor came back from `boost`.
    ValueError
        If parameters are DTensors, or ``checkpoint`` is, or is in, a checkpoint that `booster.save` has committed.
    """
    refuse_parts(optimizer, "save_optimizer")
    check_options(optimizer, f"save_optimizer to {checkpoint}")
    path = Path(checkpoint).absolute()
    if path.suffix in FILE_SUFFIXES and not path.is_dir():
        if shard or path.suffix == ".safetensors":
            raise ValueError(
                f"an optimizer is saved to a folder, or to one .pt, .pth, .bin or .ckpt file; got {str(path)!r}"
            )
        save(optimizer, f"save_optimizer to {path}", partial(_file, optimizer, path), use_async)
        return
    if path.is_file():
        raise ValueError(f"{str(path)!r} is a file and not a folder; end the name in .pt, .pth, .bin or .ckpt")
    if not isinstance(optimizer, ManagedOptimizer):
        raise TypeError(
            "only a HybridAdam, or what booster.boost returned, is saved to a folder, got "
            f"{type(optimizer).__name__}; give a .pt file"
        )
    limit = size_limit(size_per_shard)
    listed = partial(_folder, optimizer, path, f"{prefix}." if prefix else "", limit if shard else None)
    save(optimizer, f"save_optimizer to {path}", listed, use_async)


def _file(optimizer: Optimizer, path: Path, writers: Sequence[int]) -> Saving:
    refuse_committed(path)
    content = TorchFile(path.name, partial(whole_state_dict, optimizer))
    return Saving([content], path.parent, path.name, lambda stage: stage.commit([path.name]))


def _folder(
    optimizer: ManagedOptimizer, folder: Path, prefix: str, limit: int | None, writers: Sequence[int]
) -> Saving:
    refuse_committed(folder)
    name = prefix + JSON_NAME
    states = States.of(optimizer, prefix, limit, folder / name, writers)

    def commit(stage: Stage) -> None:
        with stage.alone():
            before = [*_files_of(folder / name), *find_shards(folder, prefix + TENSORS_NAME)]
            now = stage.commit_indexed([content.name for content in states.files], name, states.index)
            stage.discard(file for file in before if file not in now)

    return Saving(states.files, folder, name, commit)


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
    wait_for_saves(optimizer)  # it may be what is to be loaded
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
    saved = files.settled(path, partial(read_optimizer, path, files))
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
