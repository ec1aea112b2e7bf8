"""One state of one parameter, as state dicts and checkpoints have it, from the chunks and into them."""

import torch
from torch import Tensor

from ..chunk import ChunkManager
from ..nn.optimizer.rules.rule import Rule
from ..updates.values import Values


def read_state(values: Values, rule: Rule, parameter: Tensor, name: str) -> Tensor:
    """A copy on CPU, in the parameter's shape."""
    kept = [values.read(parameter, buffer) for buffer in rule.kept_names(name)]
    slot = values.manager.slot(parameter)
    saved = rule.to_saved(name, [tensor.as_strided((tensor.numel(),), (1,)) for tensor in kept])
    return saved.as_strided(slot.shape, slot.stride)


def home_of(manager: ChunkManager, rule: Rule, parameter: Tensor, name: str) -> Tensor | None:
    """The memory of a state itself, in the parameter's shape, when no update is writing it any more.

    None where it is not on the parameter's device, or has the values in another form than state dicts.
    """
    place = manager.find(parameter)
    assert place is not None
    chunk, position = place
    (kept, *others) = rule.kept_names(name)
    home = chunk.homes[kept].tensor
    saved = next(spec for spec in rule.saved_slots(chunk.states) if spec.name == name)
    if others or home is None or home.device != parameter.device or home.dtype != saved.dtype:
        return None
    if chunk.codecs[kept].computes:
        return None
    chunk.settle()
    at = chunk.place(position, kept)
    if len(at.own) < at.numel:
        return None
    with torch.no_grad():
        return home.as_strided(at.shape, at.stride, home.storage_offset() + at.index)


def write_state(values: Values, rule: Rule, parameter: Tensor, name: str, value: Tensor) -> None:
    """Put ``value`` (any dtype, the parameter's shape) where it belongs."""
    buffers = rule.kept_names(name)
    if len(buffers) == 1:
        values.write(parameter, buffers[0], value)
        return
    slot = values.manager.slot(parameter)
    flat = value.detach().new_empty(slot.numel, device="cpu")
    flat.as_strided(slot.shape, slot.stride).copy_(value)
    for buffer, kept in zip(buffers, rule.to_kept(name, flat), strict=True):
        shaped = kept.as_strided(slot.shape, slot.stride) if kept.numel() == slot.numel else kept
        values.write(parameter, buffer, shaped)
