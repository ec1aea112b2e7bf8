"""Values into homes: those of the model, and the states of an optimizer that has stepped before."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..chunk import MASTER, Chunk, ChunkManager, write_slot
from ..lazy import is_lazy, materialize
from ..nn.optimizer.managed import ManagedOptimizer
from ..packing.packing import Packing
from ..step.unfreezing import fill_states
from ..torch_private import own_buffers
from .parameter_data import give_data


def fill(model: nn.Module, packing: Packing, manager: ChunkManager, device: torch.device, are_copied: bool) -> None:
    """Put values into homes, one parameter at a time; then every parameter follows its chunk.

    Parameters
    ----------
    are_copied
        With several ranks, have the values of the first one on all.
    """
    places: dict[int, tuple[Chunk, int]] = {}
    for chunk in manager.chunks:
        for position, slot in enumerate(chunk.layout.slots):
            places[id(packing.parameters[slot.key])] = (chunk, position)

    def write(parameter: Tensor, value: Tensor) -> Tensor:
        if are_copied:
            manager.together.communicator.copy_from_first(value)
        place = places.get(id(parameter))
        if place is None:
            return value.to(device)
        write_slot(*place, MASTER, value)
        return torch.full((), float("nan"), dtype=value.dtype, device=device).expand(value.shape)

    lazy = {id(p) for p in model.parameters() if is_lazy(p)}
    materialize(model, write)
    for parameter in model.parameters():
        if id(parameter) not in lazy:
            give_data(parameter, write(parameter, parameter.data))
    for parameter in packing.parameters:
        manager.bind(parameter, *places[id(parameter)])
    if are_copied:
        for module in model.modules():
            for buffer in own_buffers(module).values():
                if buffer is not None and not is_lazy(buffer):
                    manager.together.communicator.copy_from_first(buffer)
    if device.type != "cpu":
        for module in model.modules():
            for name, buffer in own_buffers(module).items():
                if buffer is not None:
                    own_buffers(module)[name] = buffer.to(device)


def take_over_states(optimizer: ManagedOptimizer, manager: ChunkManager) -> None:
    """An optimizer that has stepped before goes on where it was; one that starts with states gets them."""
    if optimizer.rule.has_initial_state:
        for chunk in manager.chunks:
            fill_states(optimizer.rule, chunk)
    for parameter, saved in optimizer.state.items():
        place = manager.find(parameter)
        if place is None or not place[0].is_trainable:
            continue
        for name in place[0].codecs:
            if given_state(saved).get(name) is not None:
                write_slot(*place, name, saved[name])


def given_state(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state that an optimizer brings; nothing if it made it inside ``LazyInitContext``, before its first step."""
    return {} if any(is_lazy(value) for value in saved.values() if isinstance(value, Tensor)) else saved
