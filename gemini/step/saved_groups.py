"""Comparing a saved optimizer with the one that is to take it over."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..chunk import BufferSpec
from ..nn.optimizer.managed import ManagedOptimizer
from ..nn.optimizer.rules.rule import Rule, whole_steps

_BESIDE = ("step", "master")
"""What a state has beside the slots of the optimizer's rule."""


def check_groups(
    optimizer: ManagedOptimizer,
    saved_groups: Sequence[Mapping[str, Any]],
    states: Mapping[int, Mapping[str, Any]],
    room: Mapping[int, Sequence[BufferSpec]],
) -> None:
    """Compare a saved state with the optimizer before anything is changed.

    Parameters
    ----------
    room
        By group: the states that its chunks have room for; groups without chunks have none.

    Raises
    ------
    ValueError
        If groups, states or shapes differ, or an option is not supported; all in one message.
    """
    ours, theirs = [len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in saved_groups]
    if ours != theirs:
        raise ValueError(f"the saved optimizer has groups of {theirs} parameters, this one has groups of {ours}")
    rule, faults = optimizer.rule, []
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        merged = {**group, **saved}
        rule.refuse(merged)
        slots = rule.slots(merged)
        lacking = [slot.name for slot in slots if index in room and slot not in room[index]]
        if lacking:
            faults.append(
                f"with its options {rule.name} keeps {', '.join(lacking)}, for which group {index} has no room; give "
                "the optimizer these options before booster.boost"
            )
        wanted = set(rule.codecs(slots))
        known = set(rule.codecs((*slots, *rule.slots(group), *room.get(index, ()))))
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            kept_beside = set(optimizer.state.get(parameter, ()))
            faults += _faults(parameter, number, states.get(number, {}), wanted, known, kept_beside, rule)
    if faults:
        raise ValueError("the saved optimizer does not fit: " + "; ".join(faults))


def load_options(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Give a group the options of a saved one, and its names if it has any. Copies."""
    group.update({key: copy.deepcopy(value) for key, value in saved.items() if key != "params"})


def _faults(
    parameter: Tensor,
    number: Any,
    state: Mapping[str, Any],
    wanted: set[str],
    known: set[str],
    kept_beside: set[str],
    rule: Rule,
) -> Iterator[str]:
    found = {name: value for name, value in state.items() if value is not None and name not in _BESIDE}
    shape = tuple(parameter.shape)
    # What looks like a value for each element tells of another optimizer; other entries are somebody's notes.
    unknown = [name for name in found if name not in known | kept_beside and _shape_of(found[name]) == shape]
    if unknown:
        yield f"parameter {number} has {', '.join(unknown)}, which {rule.name} does not keep"
    elif found:
        yield from (f"{number}.{name} is missing" for name in sorted(wanted - found.keys()))
    for name in found.keys() & known:
        if _shape_of(found[name]) != shape:
            yield f"{name} of parameter {number}: saved {_shape_of(found[name])}, expected {shape}"
    if rule.takes_step and state.get("step") is not None:
        try:
            whole_steps(state["step"])
        except ValueError as error:
            yield f"parameter {number}: {error}"


def _shape_of(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if hasattr(value, "shape") else None
