"""Saving and loading a model's weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.errors import CheckpointError

from .background import save
from .bitsandbytes import as_laid_out, dequantised
from .committed import newest, refuse_committed
from .contents import Saving
from .hugging_face import may_be_missing, resolve_names
from .match import Source, match
from .model_contents import Weights, configuration_files
from .module_loading import load_stored, own_loading
from .pairs import Checked, check_pairs
from .ranks import checked_by_all, loaded_by_all, wait_for_saves
from .safetensors_stream import OpenFiles
from .stage import Stage
from .weight_files import (
    FILE_SUFFIXES,
    INDEX_SUFFIX,
    SAFE_NAME,
    TORCH_NAME,
    WEIGHT_NAMES,
    find_shards,
    read_sources,
    read_weight_map,
    size_limit,
)

_SAVED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def save_model(
    model: nn.Module,
    checkpoint: str | Path,
    *,
    shard: bool = False,
    prefix: str | None = None,
    size_per_shard: int | str = 1024,
    use_safetensors: bool = True,
    use_async: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the weights, fp32 where the model trains, so that with the optimizer's file training goes on bit for bit.

    Saving to safetensors takes 2 MiB for each of a few threads, however large tensors are; where these are on an
    accelerator or with other ranks, or saved with ``use_async``, the memory of the largest one. A crash or a full disk
    at any moment leaves the checkpoint that was there before.

    Parameters
    ----------
    model
        Boosted or plain.
    checkpoint
        A name that ends in ``.safetensors``, or in ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` (``torch.save`` of the
        state dict): one file. Anything else: a folder in the Hugging Face layout, which ``from_pretrained`` reads, with
        the configuration of transformers' models. Other files in the folder stay. Several ranks that save together
        write a safetensors file each.
    shard
        Into a folder: cut the weights into files of ``size_per_shard``, with an index, if they are larger than that.
    prefix
        Put before the names of weight files, with a dot.
    size_per_shard
        MiB as a number, or ``"5GB"``.
    use_safetensors
        False: ``torch.save`` files. These hold tied tensors under all of their names, safetensors files once. In a
        folder only; the suffix of a single file decides for it.
    use_async
        Return at once and write while training goes on; see `gemini.checkpoint.background`.
    dtype
        Round floating-point weights and buffers to ``torch.bfloat16``, ``float16``, ``float32`` or ``float64``, for
        inference; None: save them as they are kept. Loaded, such weights fill fp32 masters with the rounded values.

    Raises
    ------
    CheckpointError
        If the files cannot be written, or the model has something that they cannot hold.
    TypeError, ValueError
        If ``shard`` is asked for and ``checkpoint`` is the name of a file; if ``dtype`` is none of these; if
        ``checkpoint`` is, or is in, a checkpoint that `booster.save` has committed.
    """
    _check_dtype(dtype)
    path = Path(checkpoint)
    if path.suffix in FILE_SUFFIXES and not path.is_dir():
        if shard:
            raise ValueError(f"shard=True writes several files: give a folder, not {str(path)!r}")
        name = f"{prefix}.{path.name}" if prefix else path.name
        save(model, f"save_model to {path}", partial(_file, model, path.absolute().parent, name, dtype), use_async)
        return
    if path.is_file():
        raise ValueError(f"{str(path)!r} is a file and not a folder; end the name in one of {', '.join(FILE_SUFFIXES)}")
    name = (f"{prefix}." if prefix else "") + (SAFE_NAME if use_safetensors else TORCH_NAME)
    limit = size_limit(size_per_shard)
    listed = partial(_folder, model, path.absolute(), name, limit if shard else None, dtype)
    save(model, f"save_model to {path}", listed, use_async)


def load_model(model: nn.Module, checkpoint: str | Path, *, strict: bool = True, verify: bool = True) -> Any:
    """Fill a model from a Hugging Face folder, an index, a safetensors file or a file of ``torch.save``.

    In parts of 1 MiB, into whatever the model keeps; an fp32 checkpoint fills fp32 masters exactly. Names of
    every file and tensor, and all shapes, are checked before the model is touched. Nothing in a file is executed.

    Parameters
    ----------
    model
        Boosted or plain. Models of transformers also take checkpoints of their base model and the other way round, and
        tensors under the names that older versions gave them.
    checkpoint
        A folder or a file; or a folder of checkpoints of `booster.save`, of which the newest is taken.
    strict
        Whether missing and unexpected tensors are an error, and a model that was saved in another state of training
        than the optimizer that has just been loaded. Shapes have to fit in any case.
    verify
        Whether to compare tensors with the checksums in their files, where these have any, before the model is touched.

    Returns
    -------
    NamedTuple
        ``missing_keys`` and ``unexpected_keys``, as ``load_state_dict``; with ``strict`` both are empty, but for what
        models of transformers may miss.

    Raises
    ------
    CheckpointError
        Naming the file and everything that is wrong with it. The model is as it was, unless the message says that a
        file could not be read to its end, or changed, after it had been verified.
    """
    wait_for_saves(model)  # it may be what is to be loaded
    path = newest(Path(checkpoint), *WEIGHT_NAMES)
    doing = f"load_model from {path}"
    with OpenFiles() as files:
        with checked_by_all(model, doing):
            checked = checked_model(model, path, files, strict=strict, verify=verify)
            check_pairs([checked])
        with loaded_by_all(model, doing):
            return checked.load()


def checked_model(model: nn.Module, checkpoint: Path, files: OpenFiles, *, strict: bool, verify: bool) -> Checked:
    """Check all that `load_model` checks but for the optimizer that it is to go with.

    Parameters
    ----------
    files
        Takes what has to stay open until it is loaded; it holds nothing else.
    """
    stored = dequantised(files.settled(checkpoint, partial(read_sources, checkpoint, files)), str(checkpoint))
    try:
        stored = resolve_names(model, stored)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
    stored = as_laid_out(model, stored)
    id = files.id if strict else None
    if (own := own_loading(model)) is not None:
        if faults := [f"{name}: {value.fault}" for name, value in stored.items() if _fault_of(value)]:
            raise CheckpointError(f"{checkpoint} does not fit the model, which is as it was: {', '.join(faults)}")
        load = partial(load_stored, model, stored, files.versions, strict=strict)
        return _checked(model, checkpoint, files, id, load, f"Its own loading took part: {own}", verify=verify)
    found = match(model, stored)
    found = replace(found, missing=tuple(name for name in found.missing if not may_be_missing(model, name)))
    found.check(strict, str(checkpoint))
    return _checked(model, checkpoint, files, id, partial(found.load, model), "", verify=verify)


def _checked(
    model: nn.Module,
    checkpoint: Path,
    files: OpenFiles,
    id: str | None,
    load: Callable[[], Any],
    note: str,
    *,
    verify: bool,
) -> Checked:
    if verify:
        files.verify()

    def assign() -> Any:
        try:
            return load()
        except (CheckpointError, OSError) as error:
            raise CheckpointError(
                f"{error}. The model is partly loaded: load a whole checkpoint into it. {note}".rstrip()
            ) from error

    return Checked(model, checkpoint, id, assign)


def _fault_of(value: Any) -> str | None:
    return value.fault if isinstance(value, Source) else None


def _check_dtype(dtype: torch.dtype | None) -> None:
    names = ", ".join(map(str, _SAVED_DTYPES))
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be one of {names} or None, got {dtype!r}")
    if dtype is not None and dtype not in _SAVED_DTYPES:
        raise ValueError(f"dtype must be one of {names} or None, got {dtype}: weights are rounded, not quantised")


def _file(model: nn.Module, folder: Path, name: str, dtype: torch.dtype | None, writers: Sequence[int]) -> Saving:
    refuse_committed(folder / name)
    return Saving(Weights.of(model, name, None, dtype=dtype).files, folder, name, lambda stage: stage.commit([name]))


def _folder(
    model: nn.Module, folder: Path, name: str, limit: int | None, dtype: torch.dtype | None, writers: Sequence[int]
) -> Saving:
    refuse_committed(folder)
    weights, configuration = Weights.of(model, name, limit, writers, dtype), configuration_files(model, dtype)

    def commit(stage: Stage) -> None:
        names, others = ([content.name for content in each] for each in (weights.files, configuration))
        entry = name + INDEX_SUFFIX if weights.is_sharded else name
        with stage.alone():
            before = _weight_files(folder, name)
            now = {entry}
            if weights.is_sharded:
                now.update(stage.commit_indexed(names, entry, weights.index, others, _preferred(entry)))
            else:
                stage.commit([*others, name], _preferred(entry))
            stage.discard(file for file in before if file not in now)

    return Saving([*configuration, *weights.files], folder, f"{_prefix(name)}model", commit)


def _weight_files(folder: Path, name: str) -> list[str]:
    """Weight files that are there, of the checkpoint and of saves that were killed; in the order that loaders look."""
    prefix = _prefix(name)
    first = [file for file in _entries(prefix) if (folder / file).is_file()]
    others: list[str] = []
    for base in (prefix + SAFE_NAME, prefix + TORCH_NAME):
        if base + INDEX_SUFFIX in first:
            try:
                others += read_weight_map(folder / (base + INDEX_SUFFIX)).values()
            except CheckpointError:
                pass  # what cannot be read names nothing
        others += find_shards(folder, base)
    return [*first, *dict.fromkeys(others)]


def _entries(prefix: str) -> list[str]:
    """The files that make a folder a checkpoint, in the order in which loaders look for them."""
    return [prefix + base + end for base in (SAFE_NAME, TORCH_NAME) for end in ("", INDEX_SUFFIX)]


def _preferred(entry: str) -> list[str]:
    """What loaders look for before they look for ``entry``."""
    files = _entries(_prefix(entry.removesuffix(INDEX_SUFFIX)))
    return files[: files.index(entry)]


def _prefix(name: str) -> str:
    return name.removesuffix(SAFE_NAME).removesuffix(TORCH_NAME)
