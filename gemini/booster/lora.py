"""`Booster.enable_lora`: what its arguments mean, in our order and in ColossalAI's, and the model with adapters."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..boosted import is_boosted
from ..checkpoint import verify_adapters
from ..chunk import FORMATS
from ..errors import CheckpointError
from ..formats import shown
from ..lazy import LazyInitContext, is_lazy
from ..quantization import Quantization, declare

_WANTED = "give a lora_config (peft.LoraConfig) or a pretrained_dir with saved adapters"


@dataclass(frozen=True, slots=True)
class LoraRequest:
    """Adapters to add: new ones, or those in a folder; and how the frozen layers beside them are kept."""

    config: Any
    """A ``peft.PeftConfig``; None if the adapters come from a folder."""
    folder: str | os.PathLike[str] | None
    quantization: Quantization | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "LoraRequest":
        """What arguments mean, each recognised by its type.

        Parameters
        ----------
        given
            By the names of `Booster.enable_lora`'s parameters. They may be in another's place.

        Raises
        ------
        TypeError
            If one means nothing, or two mean the same.
        ValueError
            If they name no adapters.
        """
        found: dict[str, Any] = {}
        for name, value in given.items():
            if value is None or value is False:
                continue
            kind, meant = _meaning(name, value)
            if meant is None:
                continue
            if kind in found and found[kind] != meant:
                raise TypeError(f"enable_lora got two of {kind}: {found[kind]!r} and {value!r}; {_WANTED}")
            found[kind] = meant
        if not found.keys() & {"config", "folder"}:
            raise ValueError(_WANTED)
        return cls(found.get("config"), found.get("folder"), found.get("quantization"))

    def applied(self, model: nn.Module) -> nn.Module:
        """The model with the adapters."""
        from peft import get_peft_model

        if self.folder is None:
            adapted: nn.Module = get_peft_model(model, self.config)
        else:
            adapted = _read(model, Path(self.folder))
        if self.quantization is not None:
            declare(adapted, self.quantization)
        return adapted


def _read(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapters of a folder, or of a name on the Hub."""
    from peft import PeftModel

    verify_adapters(folder)
    try:
        adapted: nn.Module = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:  # whatever peft makes of what it finds there
        if not folder.is_dir():
            raise CheckpointError(
                f"{str(folder)!r} is no folder with adapters, and no name that the Hub has: {shown(repr(error), 500)}"
            ) from error
        raise CheckpointError(
            f"{folder} does not hold adapters for this model: {shown(repr(error), 500)}. The model may have parts "
            "of them: build it anew"
        ) from error
    return adapted


def add_adapters(model: nn.Module, given: Mapping[str, Any]) -> nn.Module:
    """See `Booster.enable_lora`."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("enable_lora needs the package peft: pip install peft") from error
    request = LoraRequest.of(given)
    if any(is_boosted(module) for module in model.modules()):
        raise ValueError(
            "enable_lora comes before booster.boost, and this model is boosted: boost what enable_lora returns. To a "
            "boosted model with adapters add others with model.add_adapter or model.load_adapter"
        )
    # What some methods compute of the base (the magnitudes of DoRA) has to be recorded, too.
    is_recorded = any(map(is_lazy, nn.Module.parameters(model)))
    with LazyInitContext() if is_recorded else nullcontext():
        return request.applied(model)


def _meaning(name: str, value: Any) -> tuple[str, Any]:
    """What an argument stands for, and its value; a name of a format is a folder only in the place of one."""
    from peft import PeftConfig

    if isinstance(value, PeftConfig):
        return "config", value
    if isinstance(value, str | os.PathLike) and (
        name == "pretrained_dir" or (name == "lora_config" and value not in FORMATS)
    ):
        return "folder", value
    if name == "quantize" or value is True or isinstance(value, str | Quantization):
        return "quantization", Quantization.of(value)
    if name == "bnb_quantization_config" or hasattr(value, "load_in_4bit"):
        return "quantization", Quantization.of_bitsandbytes(value)
    raise TypeError(f"enable_lora got {name}={value!r} of type {type(value).__name__}; {_WANTED}")
