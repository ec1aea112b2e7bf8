"""Saving and loading a model's weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gemini.errors import CheckpointError
from gemini.sizes import parse_bytes

from .hugging_face import may_be_missing, resolve_names, save_configuration
from .match import match
from .names import Entry, entries, extra_states
from .ranks import checked_by_all, loaded_by_all, write_once
from .safetensors_stream import OpenFiles, SafetensorsWriter, TensorRecord, TensorSource
from .stage import Stage, remove
from .torch_file import write_torch
from .weight_files import (
    FILE_SUFFIXES,
    INDEX_SUFFIX,
    SAFE_NAME,
    TORCH_NAME,
    into_shards,
    read_sources,
    read_weight_map,
    shard_names,
)

_METADATA = {"format": "pt"}
_MEBI = 1 << 20


def save_model(
    model: nn.Module,
    checkpoint: str | Path,
    *,
    shard: bool = False,
    prefix: str | None = None,
    size_per_shard: int | str = 1024,
    use_safetensors: bool = True,
    use_async: bool = False,
) -> None:
    """Write the weights, fp32 where the model trains, so that with the optimizer's file training goes on bit for bit.

    Beside what the model holds, saving to safetensors takes the memory of its largest tensor. A crash or a full disk
    at any moment leaves the checkpoint that was there before.

    Parameters
    ----------
    model
        Boosted or plain.
    checkpoint
        A name that ends in ``.safetensors``, or in ``.bin``, ``.pt`` or ``.pth`` (``torch.save`` of the state dict):
        one file. Anything else: a folder in the Hugging Face layout, which ``from_pretrained`` reads, with the
        configuration of transformers' models. Other files in the folder stay.
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
        Accepted; the file is complete when this returns.

    Raises
    ------
    CheckpointError
        If the files cannot be written, or the model has something that they cannot hold.
    ValueError
        If ``shard`` is asked for and ``checkpoint`` is the name of a file.
    """
    path = Path(checkpoint)
    if path.suffix in FILE_SUFFIXES and not path.is_dir():
        if shard:
            raise ValueError(f"shard=True writes several files: give a folder, not {str(path)!r}")
        name = f"{prefix}.{path.name}" if prefix else path.name
        write_once(model, f"save_model to {path}", partial(_save_file, model, path.absolute().parent, name))
        return
    if path.is_file():
        raise ValueError(f"{str(path)!r} is a file and not a folder; end the name in one of {', '.join(FILE_SUFFIXES)}")
    name = (f"{prefix}." if prefix else "") + (SAFE_NAME if use_safetensors else TORCH_NAME)
    limit = size_per_shard * _MEBI if isinstance(size_per_shard, int) else parse_bytes(size_per_shard)
    if limit <= 0:
        raise ValueError(f"size_per_shard must be positive, got {size_per_shard!r}")
    save = partial(_save_folder, model, path.absolute(), name, limit if shard else None)
    write_once(model, f"save_model to {path}", save)


def load_model(model: nn.Module, checkpoint: str | Path, *, strict: bool = True, verify: bool = True) -> None:
    """Fill a model from a Hugging Face folder, an index, a safetensors file or a file of ``torch.save``.

    One tensor at a time, into whatever the model keeps it as; an fp32 checkpoint fills fp32 masters exactly. Names of
    every file and tensor, and all shapes, are checked before the model is touched. Nothing in a file is executed.

    Parameters
    ----------
    model
        Boosted or plain. Models of transformers also take checkpoints of their base model and the other way round, and
        tensors under the names that older versions gave them.
    checkpoint
        A folder or a file.
    strict
        Whether missing and unexpected tensors are an error. Shapes have to fit in any case.
    verify
        Whether to compare tensors with the checksums in their files, where these have any, before the model is touched.

    Raises
    ------
    CheckpointError
        Naming the file and everything that is wrong with it. The model is as it was, unless the message says that a
        file could not be read to its end, or changed, after it had been verified.
    """
    path = Path(checkpoint)
    doing = f"load_model from {path}"
    with OpenFiles() as files:
        with checked_by_all(model, doing):
            found = match(model, resolve_names(model, read_sources(path, files)))
            found = replace(found, missing=tuple(name for name in found.missing if not may_be_missing(model, name)))
            found.check(strict, str(path))
            if verify:
                files.verify()
        try:
            with loaded_by_all(model, doing):
                found.load(model)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{error}. The model is partly loaded: load a whole checkpoint into it") from error


def _save_file(model: nn.Module, folder: Path, name: str) -> None:
    with Stage(folder, name) as stage:
        _write(stage, name, entries(model), extra_states(model))
        stage.commit([name])


def _save_folder(model: nn.Module, folder: Path, name: str, limit: int | None) -> None:
    held = entries(model)
    extra = extra_states(model)
    dtype = next((entry.dtype for entry in held if entry.dtype.is_floating_point), None)
    shards = into_shards(held, [entry.nbytes for entry in held], limit) if limit is not None else [held]
    before = _weight_files(folder, name)
    with Stage(folder, f"{_prefix(name)}model") as stage:
        configuration = save_configuration(model, stage.path, dtype)
        if len(shards) <= 1:
            _write(stage, name, held, extra)
            stage.commit([*configuration, name])
        else:
            _save_shards(stage, name, shards, extra, configuration)
    index = name + INDEX_SUFFIX
    now = {name} if len(shards) <= 1 else {index, *read_weight_map(folder / index).values()}
    remove(folder / file for file in before if file not in now)


def _save_shards(
    stage: Stage, name: str, shards: Sequence[Sequence[Entry]], extra: Mapping[str, Any], configuration: Sequence[str]
) -> None:
    files = shard_names(name, len(shards))
    homes: dict[str, str] = {}
    for file, part in zip(files, shards, strict=True):
        _write(stage, file, part, extra if file == files[0] else {})
        # A tied tensor is in a safetensors file once, in a torch file under each of its names.
        once = file.endswith(".safetensors")
        homes.update({name: file for entry in part for name in (entry.names[:1] if once else entry.names)})
    homes.update(dict.fromkeys(extra, files[0]))
    held = [entry for part in shards for entry in part]
    sizes = {
        "total_parameters": sum(entry.numel for entry in held if isinstance(entry.tensor, nn.Parameter)),
        "total_size": sum(entry.nbytes for entry in held),
    }

    def index(where: Mapping[str, str]) -> str:
        weight_map = {tensor: where[file] for tensor, file in sorted(homes.items())}
        return json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=2) + "\n"

    stage.commit(configuration)
    stage.commit_indexed(files, name + INDEX_SUFFIX, index)


def _weight_files(folder: Path, name: str) -> list[str]:
    """Weight files of the checkpoint that is there; first those that a loader looks for."""
    prefix = _prefix(name)
    first: list[str] = []
    named: list[str] = []
    for base in (prefix + SAFE_NAME, prefix + TORCH_NAME):
        first += [file for file in (base, base + INDEX_SUFFIX) if (folder / file).is_file()]
        if (folder / (base + INDEX_SUFFIX)).is_file():
            try:
                named += dict.fromkeys(read_weight_map(folder / (base + INDEX_SUFFIX)).values())
            except CheckpointError:
                continue  # what cannot be read names nothing
    return [*first, *named]


def _prefix(name: str) -> str:
    return name.removesuffix(SAFE_NAME).removesuffix(TORCH_NAME)


def _write(stage: Stage, file: str, held: Sequence[Entry], extra: Mapping[str, Any]) -> None:
    if file.endswith(".safetensors"):
        _write_safetensors(stage, file, held, extra)
        return
    values = {name: value for entry in held for value in (entry.read(),) for name in entry.names}
    with stage.create(file) as out:
        write_torch({**values, **extra}, out)


def _write_safetensors(stage: Stage, file: str, held: Sequence[Entry], extra: Mapping[str, Any]) -> None:
    if foreign := [name for name, value in extra.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{stage.folder / file}: {', '.join(foreign)} are not tensors, which safetensors files cannot hold; "
            "save with use_safetensors=False"
        )
    sources = {entry.name: TensorSource(entry.dtype, entry.open, entry.read) for entry in held}
    sources.update({name: TensorSource.of(value) for name, value in extra.items()})
    records = [TensorRecord(entry.name, entry.dtype, entry.shape) for entry in held]
    records += [TensorRecord(name, value.dtype, tuple(value.shape)) for name, value in extra.items()]
    writer = SafetensorsWriter(records, _METADATA)
    with stage.create(file, writer.nbytes) as out:
        writer.write(out, sources)
