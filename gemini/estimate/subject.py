"""What is trained: a model that can be built without memory, and batches for it."""

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.safe_files import read_file

Batch = dict[str, Any]


class NotFound(Exception):
    """There is no such model; the message says what was looked for and what is understood."""


@dataclass(frozen=True)
class Subject:
    """A model and how to feed it. Both functions may be called under a `FakeTensorMode`."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    """Batch size and sequence length -> keyword arguments of ``forward``, such that its output is or has a loss."""


def find_subject(spec: str, overrides: dict[str, Any]) -> Subject:
    """The model that ``spec`` names.

    Parameters
    ----------
    spec
        A ``config.json`` of transformers or the folder with it; a model type of transformers such as ``gpt2`` (its
        default configuration); a name on the hub whose configuration is in the local cache; or ``module:function``,
        which returns a module, or a module and a function from batch size and sequence length to keyword arguments.
    overrides
        Fields of the configuration, or keyword arguments of the function.

    Raises
    ------
    NotFound, TypeError
        If there is no such model, or the function returns something else.
    """
    if ":" in spec and not Path(spec).exists():
        return _from_function(spec, overrides)
    return _from_transformers(spec, overrides)


def loss_of(output: Any) -> torch.Tensor:
    """The scalar to go backward from: the output's loss, a scalar output itself, or the mean of a tensor."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, dict):
        output = output.get("loss", next(iter(output.values())))
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"expected an output with a loss, or a tensor, got {type(output).__name__}")
    return output if output.dim() == 0 else output.float().mean()


def _from_function(spec: str, overrides: dict[str, Any]) -> Subject:
    module_name, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the user's module lies in the present folder
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise NotFound(f"{spec}: {error}; expected module:function that can be imported from here") from error

    def made() -> tuple[nn.Module, Callable[[int, int], Batch] | None]:
        result = function(**overrides)
        module, batch = result if isinstance(result, tuple) else (result, None)
        if not isinstance(module, nn.Module):
            raise TypeError(f"{spec} must return a torch.nn.Module, or one and a function, got {type(module).__name__}")
        return module, batch

    def batch(size: int, length: int) -> Batch:
        make = made()[1]
        if make is not None:
            return make(size, length)
        tokens = torch.zeros(size, length, dtype=torch.long)
        return {"input_ids": tokens, "labels": tokens}

    return Subject(spec, lambda: made()[0], batch)


def recorded_subject(content: Mapping[str, Any], parameters: int) -> Subject:
    """A model of transformers as a run has recorded it: ``class`` and ``config``.

    Parameters
    ----------
    parameters
        How many it has: what says that it has more layers than that is not believed.

    Raises
    ------
    NotFound
        If it cannot be built here.
    """
    try:
        import transformers
    except ImportError as error:
        raise NotFound("the run trained a model of transformers, which is not installed here") from error
    fields = dict(content["config"])
    kind = str(fields.pop("model_type", ""))
    config = _made(transformers, kind, {**fields, "architectures": [str(content["class"])]})
    if int(getattr(config, "num_hidden_layers", 0)) > parameters:
        raise NotFound(f"the recorded model has {parameters} parameters and more layers than that")
    return _subject_of(transformers, config, "as recorded")


def _from_transformers(spec: str, overrides: dict[str, Any]) -> Subject:
    try:
        import transformers
    except ImportError as error:
        raise NotFound(f"{spec} is a transformers configuration and transformers is not installed") from error
    config = _config(transformers, spec, overrides)
    return _subject_of(transformers, config, spec)


def _subject_of(transformers: Any, config: Any, name: str) -> Subject:
    cls = _class(transformers, config)

    def batch(size: int, length: int) -> Batch:
        if cls.main_input_name == "pixel_values":
            side = config.image_size
            pixels = torch.zeros(size, config.num_channels, side, side)
            return {"pixel_values": pixels, "labels": torch.zeros(size, dtype=torch.long)}
        tokens = torch.zeros(size, length, dtype=torch.long)
        labels = tokens if "ForSequenceClassification" not in cls.__name__ else tokens[:, 0]
        return {"input_ids": tokens, "labels": labels}

    return Subject(f"{cls.__name__} ({name})", lambda: cls(config), batch)


def _config(transformers: Any, spec: str, overrides: dict[str, Any]) -> Any:
    path = Path(spec)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            content = json.loads(read_file(file, 16 << 20))
            kind = content.pop("model_type")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise NotFound(f"{file} is no configuration of transformers with a model_type: {error!r}") from error
        return _made(transformers, kind, {**content, **overrides})
    if spec in transformers.CONFIG_MAPPING:
        return _made(transformers, spec, overrides)
    try:
        return transformers.AutoConfig.from_pretrained(spec, local_files_only=True, **overrides)
    except (OSError, ValueError) as error:
        raise NotFound(
            f"{spec} is no config.json or folder with one, no model type of transformers, no module:function, "
            "and no configuration in the local cache of the hub"
        ) from error


def _made(transformers: Any, kind: str, fields: dict[str, Any]) -> Any:
    try:
        config = transformers.CONFIG_MAPPING[kind](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise NotFound(f"a configuration of type {kind!r} cannot be made from {fields}: {error}") from error
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    return config


def _class(transformers: Any, config: Any) -> Any:
    """The class that the configuration names, else the first head for its type that has a loss."""
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    for auto in (
        "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForImageClassification",
        "AutoModelForSequenceClassification",
    ):  # fmt: skip
        mapping = getattr(transformers, auto)._model_mapping
        # BERT has a causal head, too, which nobody means by "bert".
        if type(config) in mapping and not (auto == "AutoModelForCausalLM" and _is_masked(transformers, config)):
            return mapping[type(config)]
    raise NotFound(f"no class with a loss is known for {type(config).__name__}; give module:function")


def _is_masked(transformers: Any, config: Any) -> bool:
    return not getattr(config, "is_decoder", False) and type(config) in transformers.AutoModelForMaskedLM._model_mapping
