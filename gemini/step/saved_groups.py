"""Comparing a saved optimizer with the one that is to take it over."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..chunk import BufferSpec, copy_fault
from ..formats import listed, shown
from ..nn.optimizer.managed import ManagedOptimizer
from ..nn.optimizer.rules.option_ranges import brief, group_faults, number_of
from ..nn.optimizer.rules.rule import Rule, whole_steps
from ..nn.optimizer.rules.rules import Rules

_BESIDE = ("step", "master")
"""What a state has beside the slots of the optimizer's rule."""


def check_groups(
    optimizer: Optimizer,
    rules: Rules | None,
    saved_groups: Sequence[Mapping[str, Any]],
    states: Mapping[int, Mapping[str, Any]],
    room: Mapping[int, Sequence[BufferSpec]],
) -> None:
    """Compare a saved state with the optimizer before anything is changed.

    Parameters
    ----------
    rules
        The optimizer's arithmetic; None if it is of no known kind, and then not all can be compared.
    room
        By group: the states that its chunks have room for; groups without chunks have none.

    Raises
    ------
    ValueError
        If groups, states or shapes differ, or an option is not supported; all in one message.
    """
    ours, theirs = [len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in saved_groups]
    if ours != theirs:
        raise ValueError(
            f"the saved optimizer has groups of {brief(theirs)} parameters, this one has groups of {brief(ours)}"
        )
    faults: list[str] = []
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        rule = None if rules is None else rules.of_group(group)
        if wrong := group_faults(rule.name if rule is not None else None, group, saved):
            faults += [f"group {index}: {fault}" for fault in wrong]
            continue
        numbers = zip(group["params"], saved["params"], strict=True)
        if rule is None:
            faults += [f for _, number in numbers for f in _unknown_faults(number, states.get(number, {}))]
            continue
        merged = {**group, **saved}
        if isinstance(optimizer, ManagedOptimizer):
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
        for parameter, number in numbers:
            kept_beside = set(optimizer.state.get(parameter, ()))
            faults += _faults(parameter, number, states.get(number, {}), wanted, known, kept_beside, rule)
    if faults:
        raise ValueError("the saved optimizer does not fit: " + listed(faults, "; ", width=300))


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
    side = rule.side(shape)
    kept_beside = kept_beside | side.keys()
    # What looks like a value for each element tells of another optimizer; other entries are somebody's notes.
    unknown = [name for name in found if name not in known | kept_beside and _shape_of(found[name]) == shape]
    if unknown:
        yield f"parameter {number} has {listed(unknown)}, which {rule.name} does not keep"
    elif found or (rule.takes_step and state.get("step") is not None):
        yield from (f"{number}.{name} is missing" for name in sorted((wanted | side.keys()) - found.keys()))
    for name in sorted(known | {"master"}):
        if state.get(name) is not None and (fault := _value_fault(state[name], shape)):
            yield f"{name} of parameter {number}: {fault}"
    for name in sorted(side.keys() & found.keys()):
        is_number = side[name] == () and number_of(found[name]) is not None
        if not is_number and (fault := _value_fault(found[name], side[name])):
            yield f"{name} of parameter {number}: {fault}"
    for name in found.keys() - known - side.keys():
        if fault := _copy_fault(found[name]):
            yield f"{shown(name)} of parameter {number}: {fault}"
    if rule.takes_step and found and state.get("step") is None:
        yield f"{number}.step is missing"
    elif rule.takes_step and state.get("step") is not None:
        try:
            whole_steps(state["step"])
        except ValueError as error:
            yield f"parameter {number}: {error}"


def _unknown_faults(number: Any, state: Mapping[str, Any]) -> Iterator[str]:
    """What would be wrong with a state of any optimizer."""
    for name, value in state.items():
        if fault := _copy_fault(value):
            yield f"{shown(name)} of parameter {number}: {fault}"


def _value_fault(value: Any, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a value for each element of a parameter."""
    if _shape_of(value) is None:
        return f"saved {brief(value)}, expected a tensor"
    if fault := _copy_fault(value):
        return fault
    if _shape_of(value) != shape:
        return f"saved {_shape_of(value)}, expected {shape}"
    return None if value.dtype.is_floating_point else f"saved {value.dtype}, expected floating-point numbers"


def _copy_fault(value: Any) -> str | None:
    fault: str | None = copy_fault(value) if isinstance(value, Tensor) else getattr(value, "fault", None)
    return fault


def _shape_of(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Tensor) and value.is_nested:
        return (-1,)
    return tuple(value.shape) if hasattr(value, "shape") else None
