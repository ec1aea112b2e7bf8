"""The files that a model is saved to: weights as one file or several with an index, and transformers' configuration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from gemini.errors import CheckpointError

from ..torch_private import with_metadata
from .contents import Bytes, Content, Tensors, TorchFile, UnreadTensor, shares_of
from .division import divided
from .hugging_face import save_configuration
from .module_loading import versions_metadata
from .names import Entry, entries, extra_states, plain_metadata
from .pairs import id_metadata
from .raw import overflow_text, overflows
from .safetensors_stream import TensorRecord
from .weight_files import INDEX_SUFFIX, SAFE_NAME, shard_names


def model_contents(model: nn.Module, limit: int, writers: Sequence[int] = (0,)) -> list[Content]:
    """The files of a model in the Hugging Face layout, unread.

    Parameters
    ----------
    limit
        Bytes of tensors in one file, at most, unless a single tensor is larger.
    writers
        The ranks that write files.
    """
    weights = Weights.of(model, SAFE_NAME, limit, writers)
    contents = [*configuration_files(model), *weights.files]
    if weights.is_sharded:
        names = [content.name for content in weights.files]
        text = weights.index(dict(zip(names, names, strict=True)))
        contents.append(Bytes(SAFE_NAME + INDEX_SUFFIX, text.encode()))
    return contents


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model as files."""

    files: tuple[Content, ...]
    homes: Mapping[str, str]
    """Name of a tensor -> its file."""
    metadata: Mapping[str, int | str]
    """What an index says of all of them."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        name: str,
        limit: int | None,
        writers: Sequence[int] = (0,),
        dtype: torch.dtype | None = None,
    ) -> "Weights":
        """One file, or several where the weights are larger than ``limit``, or several ranks write.

        Parameters
        ----------
        dtype
            What floating-point values are rounded to; None: they are saved as they are.
        """
        held, extra = [replace(entry, rounded_to=dtype) for entry in entries(model)], extra_states(model)
        # A tied tensor is in a safetensors file once, in a torch file under each of its names.
        once = name.endswith(".safetensors")
        sizes, shares = [entry.nbytes for entry in held], [shares_of(entry.in_chunks) for entry in held]
        ranks, shards = zip(*divided(held, sizes, shares, writers if once else (0,), limit), strict=True)
        names = shard_names(name, len(shards)) if len(shards) > 1 else [name]
        homes = {
            tensor: file
            for file, part in zip(names, shards, strict=True)
            for entry in part
            for tensor in (entry.names[:1] if once else entry.names)
        }
        homes.update(dict.fromkeys(extra, names[0]))
        numbers = {
            "total_parameters": sum(entry.numel for entry in held if isinstance(entry.tensor, nn.Parameter)),
            "total_size": sum(sizes),
        }
        content = _safetensors if once else partial(_torch_file, plain_metadata(model))
        # Rounded weights are of no state of training: with the optimizer's they would train on to other numbers.
        id = id_metadata(model) if all(entry.saved_dtype == entry.dtype for entry in held) else {}
        versions = versions_metadata(model)
        files = [
            content(file, part, extra if file == names[0] else {}, {**id, **(versions if once else {})}, rank)
            for file, part, rank in zip(names, shards, ranks, strict=True)
        ]
        return cls(tuple(files), homes, {**numbers, **id})

    @property
    def is_sharded(self) -> bool:
        return len(self.files) > 1

    def index(self, where: Mapping[str, str]) -> str:
        """The text of the index, with the path at which each file is found."""
        weight_map = {tensor: where[file] for tensor, file in sorted(self.homes.items())}
        return json.dumps({"metadata": self.metadata, "weight_map": weight_map}, indent=2) + "\n"


def configuration_files(model: nn.Module, dtype: torch.dtype | None = None) -> list[Content]:
    """What transformers' models have beside weights; ``dtype`` is that of the weights, None: as they are kept."""
    if dtype is None:
        dtype = next((entry.dtype for entry in entries(model) if entry.dtype.is_floating_point), None)
    with TemporaryDirectory() as folder:  # transformers writes to folders alone
        names = save_configuration(model, Path(folder), dtype)
        return [Bytes(name, (Path(folder) / name).read_bytes()) for name in names]


def _torch_file(
    metadata: Mapping[str, Any],
    file: str,
    held: Sequence[Entry],
    extra: Mapping[str, Any],
    id: Mapping[str, str],
    rank: int,
) -> Content:
    def state_dict() -> dict[str, Any]:
        values = {name: value for entry in held for value in (_rounded(entry),) for name in entry.names}
        return with_metadata({**values, **extra}, {**metadata, "": {**metadata.get("", {}), **id}})

    return TorchFile(file, state_dict, rank=rank)


def _rounded(entry: Entry) -> Tensor:
    value = entry.read()
    rounded = value.to(entry.saved_dtype)
    if overflows(rounded, value):
        raise CheckpointError(overflow_text(entry.name))
    return rounded


def _safetensors(
    file: str, held: Sequence[Entry], extra: Mapping[str, Any], id: Mapping[str, str], rank: int
) -> Content:
    if foreign := [name for name, value in extra.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{file}: {', '.join(foreign)} are not tensors, which safetensors files cannot hold; "
            "save with layout='dcp' (booster.save) or use_safetensors=False (booster.save_model)"
        )
    tensors = [
        UnreadTensor(
            TensorRecord(entry.name, entry.saved_dtype, entry.shape, entry.dtype),
            entry.read,
            entry.in_chunks,
            entry.open,
        )
        for entry in held
    ]
    tensors += [
        UnreadTensor(TensorRecord(name, value.dtype, tuple(value.shape)), value.detach().cpu)
        for name, value in extra.items()
    ]
    return Tensors(file, tensors, {"format": "pt", **id}, rank)  # the format that transformers expects
