"""One state of one parameter, as state dicts and checkpoints have it, from the chunks and into them."""

import torch
from torch import Tensor

from ..chunk import ChunkManager, Codec, announce_change
from ..nn.optimizer.rules.rule import Rule
from ..updates.values import Values


def read_state(values: Values, rule: Rule, parameter: Tensor, name: str) -> Tensor:
    """A copy on CPU, in the parameter's shape."""
    codec, slot = codec_of(values.manager, rule, parameter, name), values.manager.slot(parameter)
    kept = {spec.name: values.read(parameter, spec.name) for spec in codec.specs}
    flat = {buffer: tensor.as_strided((tensor.numel(),), (1,)) for buffer, tensor in kept.items()}
    return codec.decode(flat).as_strided(slot.shape, slot.stride)


def home_of(manager: ChunkManager, rule: Rule, parameter: Tensor, name: str) -> Tensor | None:
    """The memory of a state itself, in the parameter's shape, when no update is writing it any more.

    None where it is not on the parameter's device, is kept with other ranks, or has the values in another form than
    state dicts.
    """
    place = manager.find(parameter)
    assert place is not None
    chunk, position = place
    if chunk.is_shared:
        return None  # other ranks have parts of it, or read ours
    codec = codec_of(manager, rule, parameter, name)
    kept = codec.specs[0].name
    home = chunk.homes[kept].tensor
    if codec.computes or home is None or home.device != parameter.device or home.dtype != codec.dtype:
        return None
    if chunk.codecs[kept].computes:
        return None
    chunk.settle()
    announce_change(chunk, position)
    at = chunk.place(position, kept)
    with torch.no_grad():
        return home.as_strided(at.shape, at.stride, home.storage_offset() + at.index)


def write_state(values: Values, rule: Rule, parameter: Tensor, name: str, value: Tensor) -> None:
    """Put ``value`` (any dtype, the parameter's shape) where it belongs."""
    codec, slot = codec_of(values.manager, rule, parameter, name), values.manager.slot(parameter)
    if not codec.computes:
        values.write(parameter, codec.specs[0].name, value)  # it rounds
        return
    flat = value.detach().new_empty(slot.numel, device="cpu")
    flat.as_strided(slot.shape, slot.stride).copy_(value)
    for buffer, kept in codec.encode(flat, {}).items():
        shaped = kept.as_strided(slot.shape, slot.stride) if kept.numel() == slot.numel else kept
        values.write(parameter, buffer, shaped)


def read_own_state(values: Values, rule: Rule, parameter: Tensor, name: str) -> Tensor:
    """A copy on CPU of what is at home here (flat)."""
    codec = codec_of(values.manager, rule, parameter, name)
    return codec.decode({spec.name: values.read_own(parameter, spec.name) for spec in codec.specs})


def write_own_state(values: Values, rule: Rule, parameter: Tensor, name: str, own: Tensor) -> None:
    """Replace what is at home here (flat, on CPU)."""
    codec = codec_of(values.manager, rule, parameter, name)
    for buffer, kept in codec.encode(own.to(codec.dtype), {}).items():
        values.write_own(parameter, buffer, kept)


def codec_of(manager: ChunkManager, rule: Rule, parameter: Tensor, name: str) -> Codec:
    """How a state of a parameter lies in the buffers of its chunk."""
    place = manager.find(parameter)
    assert place is not None
    return rule.codecs(place[0].states)[name]
