"""Saving the LoRA adapters of a model, in the layout of peft."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .names import entries
from .ranks import write_once
from .stage import Stage

_OTHER = {".bin": ".safetensors", ".safetensors": ".bin"}
"""Weights in the other format belong to an older save; peft would prefer the safetensors file."""


def save_lora(model: nn.Module, checkpoint: str | Path, *, use_safetensors: bool = False) -> None:
    """Write adapters and their configuration, fp32 where they train; ``PeftModel.from_pretrained`` reads them.

    Beside the adapters nothing of the model is gathered. A crash or a full disk leaves the files that were there.

    Parameters
    ----------
    model
        What `Booster.enable_lora` returned, boosted or not.
    checkpoint
        A folder.
    use_safetensors
        False: a file of ``torch.save``.

    Raises
    ------
    TypeError
        If the model has no adapters of peft.
    CheckpointError
        If the files cannot be written.
    """
    if getattr(model, "save_pretrained", None) is None or not hasattr(model, "peft_config"):
        raise TypeError(
            f"expected the model that booster.enable_lora returned, got a {type(model).__name__} without adapters: "
            "save it with booster.save_model"
        )
    write_once(model, f"save_lora to {checkpoint}", partial(_save, model, Path(checkpoint).absolute(), use_safetensors))


def _save(model: Any, folder: Path, use_safetensors: bool) -> None:
    wanted = set(_adapter_names(model))
    state = {name: each.read() for each in entries(model) for name in each.names if name in wanted}
    with Stage(folder, "adapter") as stage:
        model.save_pretrained(str(stage.path), state_dict=state, safe_serialization=use_safetensors)
        files = [file for file in stage.path.rglob("*") if file.is_file()]
        files.sort(key=lambda file: file.suffix in _OTHER)  # the weights last: a configuration seldom changes
        names = [str(file.relative_to(stage.path)) for file in files]
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)  # each adapter but the default one has a folder
        weights = [Path(name) for name in names if Path(name).suffix in _OTHER]
        with stage.alone():
            stage.commit(names, [str(path.with_suffix(_OTHER[path.suffix])) for path in weights])
            stage.discard(())


def _adapter_names(model: Any) -> Iterator[str]:
    """Of tensors that peft may write: adapters, what trains beside them, and embeddings, which may have grown."""
    embeddings = {id(tensor) for each in _embeddings(model) for tensor in each.parameters()}
    for entry in entries(model):
        for name in entry.names:
            is_adapter = "lora_" in name or ".modules_to_save." in name
            if is_adapter or entry.tensor.requires_grad or id(entry.tensor) in embeddings:
                yield name


def _embeddings(model: Any) -> Iterator[nn.Module]:
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        if hasattr(model, ask) and (found := getattr(model, ask)()) is not None:
            yield found
