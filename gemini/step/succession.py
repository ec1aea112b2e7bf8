"""Giving a model that has been boosted with one optimizer another one."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..chunk import Chunk, ChunkManager, StateSlot
from ..nn.optimizer.managed import ManagedOptimizer

_WAY_OUT = (
    "Go on with the optimizer that the model has, or build the model anew, load its state_dict() and boost it with the "
    "new optimizer"
)


class Superseded:
    """The `ManagedStep` of an optimizer whose place another one has taken: refuses everything."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "the model of this optimizer has been given another one since, and the states of this one are gone; use "
            "the other one"
        )

    step = zero_grad = state_dict = load_state_dict = add_param_group = _refuse
    clip_grad_by_norm = clip_grad_by_value = _refuse


def grouped(manager: ChunkManager, optimizer: ManagedOptimizer) -> list[tuple[list[Tensor], tuple[StateSlot, ...]]]:
    """The parameters of each group that are in chunks with states, and the states that these chunks have room for.

    Raises
    ------
    ValueError
        If the optimizer keeps other states than there is room for, or leaves out a parameter that is updated.
    """
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        wanted = optimizer.rule.slots(group)
        trainable = [p for p in group["params"] if (place := manager.find(p)) is not None and place[0].is_trainable]
        for parameter in trainable:
            chunk, position = _place(manager, parameter)
            if (room := tuple(chunk.states.values())) != wanted:
                raise ValueError(
                    f"the model was boosted with an optimizer that keeps {_listed(room)} of "
                    f"{chunk.layout.slots[position].name}, and the {optimizer.rule.name} that is to go on with it "
                    f"keeps {_listed(wanted)} (group {index}). {_WAY_OUT}"
                )
        groups.append((trainable, wanted))
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for chunk in manager.chunks:
        for slot, binding in zip(chunk.layout.slots, chunk.bindings, strict=True):
            if chunk.is_trainable and binding.parameter.requires_grad and id(binding.parameter) not in known:
                raise ValueError(
                    f"{slot.name} is trained, and the {optimizer.rule.name} that is to go on with the model does not "
                    f"have it: freeze it with requires_grad_(False) first, or give the optimizer all parameters"
                )
    return groups


def frozen(manager: ChunkManager, group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group that are in chunks without states."""
    return [p for p in group["params"] if (place := manager.find(p)) is not None and not place[0].is_trainable]


def trainable_chunks(manager: ChunkManager) -> Sequence[Chunk]:
    return [chunk for chunk in manager.chunks if chunk.is_trainable]


def begin_anew(manager: ChunkManager, optimizer: ManagedOptimizer, steps: dict[int, int]) -> None:
    """Make all states what they are before an optimizer's first step."""
    for chunk in trainable_chunks(manager):
        for binding in chunk.bindings:
            if steps.pop(id(binding.parameter), 0) or optimizer.rule.starts_filled:
                for role, slot in chunk.states.items():
                    manager.write(binding.parameter, role, torch.full((), optimizer.rule.initial(slot.name)))


def _place(manager: ChunkManager, parameter: Tensor) -> tuple[Chunk, int]:
    place = manager.find(parameter)
    assert place is not None
    return place


def _listed(slots: Sequence[StateSlot]) -> str:
    return ", ".join(f"{slot.name} in {slot.dtype}" for slot in slots) or "nothing"
