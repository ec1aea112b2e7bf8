"""Giving a model that has been boosted with one optimizer another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..chunk import BufferSpec, ChunkManager
from ..nn.optimizer.managed import ManagedOptimizer

_WAY_OUT = (
    "Go on with the optimizer that the model has, or build the model anew, load its state_dict() and boost it with the "
    "new optimizer"
)


@dataclass(frozen=True, slots=True)
class Superseded:
    """The `ManagedStep` of an optimizer that does not train its model any more: refuses everything."""

    since: str = "has been given another one"
    """What has happened to the model."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"the model of this optimizer {self.since} since, and the states of this one are gone; use another "
            "optimizer"
        )

    backward = gradient_norm = was_skipped = _refuse
    step = zero_grad = state_dict = load_state_dict = add_param_group = _refuse
    states = replace_states = clip_grad_by_norm = clip_grad_by_value = _refuse


def check_room(manager: ChunkManager, optimizer: ManagedOptimizer) -> None:
    """Compare the states that an optimizer keeps with those that chunks have room for.

    Raises
    ------
    ValueError
        If they differ.
    """
    for index, group in enumerate(optimizer.param_groups):
        rule = optimizer.rules.of_group(group)
        wanted = rule.slots(group)
        for parameter in group["params"]:
            place = manager.find(parameter)
            if place is None or not place[0].is_trainable:
                continue
            chunk, position = place
            if (room := chunk.states) != wanted:
                raise ValueError(
                    f"the model was boosted with an optimizer that keeps {_listed(room)} of "
                    f"{chunk.layout.slots[position].name}, and the {rule.name} that is to go on with it "
                    f"keeps {_listed(wanted)} (group {index}). {_WAY_OUT}"
                )


def _listed(slots: Sequence[BufferSpec]) -> str:
    return ", ".join(f"{slot.name} in {slot.dtype}" for slot in slots) or "nothing"
