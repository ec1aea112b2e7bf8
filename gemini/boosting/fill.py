"""Values into homes: those of the model, and the states of an optimizer that has stepped before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..chunk import MASTER, Chunk, ChunkManager, read_slot, write_slot
from ..lazy import is_lazy, materialize
from ..nn.optimizer.managed import ManagedOptimizer
from ..packing.packing import Packing
from ..step.unfreezing import fill_states
from ..torch_private import own_buffers
from .parameter_data import give_data


@dataclass(frozen=True, slots=True)
class _Form:
    """How the memory of a parameter was that has given it up."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor) -> "_Form":
        return cls(parameter.shape, parameter.stride(), parameter.dtype, parameter.device)

    def filled(self, values: Tensor) -> Tensor:
        """Memory like it, with these values."""
        memory = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return memory.copy_(values.view(self.shape))


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
    given: list[tuple[nn.Parameter, _Form]] = []
    try:
        for parameter in model.parameters():
            if id(parameter) not in lazy:
                stand_in, form = write(parameter, parameter.data), _Form.of(parameter)
                given.append((parameter, form))
                give_data(parameter, stand_in)
    except BaseException:  # a disk that cannot be written to: the model is to be as it was
        for emptied, form in given:
            if id(emptied) in places:
                values = read_slot(*places[id(emptied)], MASTER, manager.together.communicator)
                give_data(emptied, form.filled(values))
        raise
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
    for chunk in manager.chunks:
        if chunk.is_trainable and (rule := optimizer.rules.of(chunk.bindings[0].parameter)).has_initial_state:
            fill_states(rule, chunk)
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
