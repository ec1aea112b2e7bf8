"""Saving the adapters of a model, in the layout of peft.

peft decides which tensors belong to an adapter and what they are called: it is asked with the model's own objects in
the place of values, and writes its configuration beside empty weights. Then the values follow, one tensor at a time.
"""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .committed import refuse_committed
from .moment import Moment
from .names import Entry, entries, named_objects
from .ranks import write_once
from .safetensors_stream import SafetensorsFile, SafetensorsWriter, TensorRecord
from .stage import Stage
from .torch_file import read_torch, write_torch

_SAFE_NAME, _TORCH_NAME = "adapter_model.safetensors", "adapter_model.bin"
_DEFAULT = "default"
_METADATA = {"format": "pt"}


def save_lora(model: nn.Module, checkpoint: str | Path, *, use_safetensors: bool = False) -> None:
    """Write adapters and their configurations, fp32 where they train; ``PeftModel.from_pretrained`` reads them.

    Beside what the model holds, saving to safetensors takes the memory of the largest tensor that is saved, a file of
    ``torch.save`` that of all of them. A crash or a full disk leaves the files that were there.

    Parameters
    ----------
    model
        With adapters of peft: what `Booster.enable_lora` or ``get_peft_model`` returned, boosted or not.
    checkpoint
        A folder. As peft does it, each adapter has a folder in it, except the one named ``"default"``.
    use_safetensors
        False: files of ``torch.save``.

    Raises
    ------
    TypeError
        If the model has no adapters of peft.
    CheckpointError
        If the files cannot be written.
    ValueError
        If ``checkpoint`` is, or is in, a checkpoint that `booster.save` has committed.
    """
    if getattr(model, "save_pretrained", None) is None or not hasattr(model, "peft_config"):
        raise TypeError(
            f"expected the model that booster.enable_lora returned, got a {type(model).__name__} without adapters: "
            "save it with booster.save_model"
        )
    write_once(model, f"save_lora to {checkpoint}", partial(_save, model, Path(checkpoint).absolute(), use_safetensors))


def verify_adapters(folder: Path) -> None:
    """Compare saved adapters with the checksums in their files, if they are there and have some.

    Raises
    ------
    CheckpointError
        If one disagrees, naming file and tensor.
    """
    if (folder / _SAFE_NAME).is_file():
        with SafetensorsFile(folder / _SAFE_NAME) as file:
            file.verify()
    elif (folder / _TORCH_NAME).is_file():
        read_torch(folder / _TORCH_NAME)


def _save(model: Any, folder: Path, use_safetensors: bool) -> None:
    refuse_committed(folder)
    moment = Moment.now(f"save_lora to {folder}", [model])
    held = {id(entry.tensor): entry for entry in entries(model)}
    objects = named_objects(model)
    file, other = (_SAFE_NAME, _TORCH_NAME) if use_safetensors else (_TORCH_NAME, _SAFE_NAME)
    with Stage(folder, "adapter") as stage:
        with warnings.catch_warnings():  # of what peft says of the weights it says the same below
            warnings.simplefilter("ignore")
            nothing = dict.fromkeys(objects, torch.empty(0, device="cpu"))
            model.save_pretrained(str(stage.path), state_dict=nothing, safe_serialization=use_safetensors)
        places = {adapter: "" if adapter == _DEFAULT else f"{adapter}/" for adapter in model.peft_config}
        for adapter, place in places.items():
            (stage.path / place / file).unlink()
            _write(stage, place + file, _of_adapter(model, adapter, objects), held)
        files = [path for path in stage.path.rglob("*") if path.is_file()]
        files.sort(key=lambda path: path.name == file)  # the weights last: a configuration seldom changes
        names = [str(path.relative_to(stage.path)) for path in files]
        moment.check()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
        with stage.alone():
            stage.commit(names, shadowing=[place + other for place in places.values()])  # of an earlier save
            stage.discard(())


def _of_adapter(model: Any, adapter: str, objects: Mapping[str, Any]) -> dict[str, Tensor]:
    """What peft saves of one adapter, by the names in its file: the model's own objects, or what peft made of them."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=dict(objects), adapter_name=adapter)
    return found


def _write(stage: Stage, name: str, tensors: Mapping[str, Tensor], held: Mapping[int, Entry]) -> None:
    def read(name: str) -> Tensor:
        entry = held.get(id(tensors[name]))
        return tensors[name].detach().cpu() if entry is None else entry.read()

    def record(name: str, tensor: Tensor) -> TensorRecord:
        kept = held.get(id(tensor), tensor)
        return TensorRecord(name, kept.dtype, tuple(kept.shape))

    if name.endswith(_TORCH_NAME):
        with stage.create(name) as out:
            write_torch({each: read(each) for each in tensors}, out)
        return
    writer = SafetensorsWriter([record(*item) for item in tensors.items()], _METADATA)
    with stage.create(name, writer.nbytes) as out:
        writer.write(out, read)
