"""What transformers does to stored tensors besides renaming them: experts of a mixture that it keeps as one tensor.

Its conversions run tensor by tensor here: on tensors without memory to learn the shapes, and again with the values when
the tensor is wanted.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemini.errors import CheckpointError

from ..formats import listed, shown
from .match import Source


@dataclass(frozen=True, slots=True)
class Conversions:
    """The renamings and converters of the installed transformers for one model; none where they cannot be had."""

    renamings: tuple[Any, ...] = ()
    converters: tuple[Any, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> "Conversions":
        if not hasattr(model, "base_model_prefix"):
            return cls()
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError:  # before transformers 5
            return cls()
        found = get_model_conversion_mapping(model)
        return cls(
            tuple(item for item in found if isinstance(item, WeightRenaming)),
            tuple(item for item in found if isinstance(item, WeightConverter)),
        )

    def rename(self, name: str) -> str:
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def converted(self, model: nn.Module, stored: Mapping[str, Source]) -> tuple[dict[str, Source], set[str]]:
        """Tensors that several stored ones make up, or that are cut out of one, and the stored names used for them."""
        groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for name in sorted(stored, key=_natural):
            renamed = self.rename(name)
            for converter in self.converters:
                target, pattern = converter.rename_source_key(renamed)
                if pattern is not None:
                    groups.setdefault(target, (converter, []))[1].append((name, pattern))
                    break
        found: dict[str, Source] = {}
        for target, (converter, parts) in groups.items():
            found.update(_results(model, target, converter, parts, stored))
        return found, {name for _, parts in groups.values() for name, _ in parts}


def _results(
    model: nn.Module, target: str, converter: Any, parts: Sequence[tuple[str, str]], stored: Mapping[str, Source]
) -> dict[str, Source]:
    def convert(read: Callable[[Source], Tensor]) -> dict[str, Tensor]:
        one = copy.deepcopy(converter)
        for name, pattern in parts:
            one.add_tensor(target, name, pattern, read(stored[name]))
        made = one.convert(target, model=model, config=getattr(model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    faults = (f"is made of {name}, which {fault}" for name, _ in parts if (fault := stored[name].fault) is not None)
    fault = next(faults, None)

    def source(name: str, like: Tensor) -> Source:
        return Source(tuple(like.shape), like.dtype, lambda: convert(lambda part: part.read())[name], fault)

    try:
        shapes = convert(lambda part: torch.empty(part.shape, dtype=part.dtype, device="meta"))
    except Exception as error:  # whatever transformers' operations make of tensors that do not belong together
        names = listed(name for name, _ in parts)
        raise CheckpointError(f"{target} cannot be made of the stored {names}: {shown(error, 300)}") from error
    return {name: source(name, value) for name, value in shapes.items()}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts expert 10 after expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
