"""Whether a saved optimizer fits one that is to take it over: everything is compared before anything is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gemini.errors import CheckpointError
from gemini.nn.optimizer.acceptance import known_rules, rule_name
from gemini.nn.optimizer.managed import ManagedOptimizer
from gemini.nn.optimizer.rules.option_ranges import group_faults
from gemini.step.saved_groups import check_groups
from gemini.updates.scaler import LossScaler

from ..formats import listed, shown
from .match import Source
from .optimizer_files import SavedOptimizer
from .optimizer_view import managed, names_of


def checked_saved(optimizer: Optimizer, saved: SavedOptimizer, path: Path) -> SavedOptimizer:
    """What is to be loaded: in the optimizer's order, and as the hooks of users would have it.

    Raises
    ------
    CheckpointError
        Naming the file and what does not fit; the optimizer is as it was.
    """
    name = rule_name(optimizer)
    if None not in (name, saved.optimizer) and name != saved.optimizer:
        raise CheckpointError(
            f"{path} has the state of {shown(saved.optimizer)}, which {name} cannot go on with; the optimizer is as it "
            "was"
        )
    if isinstance(optimizer, ManagedOptimizer):
        if optimizer.has_load_state_dict_pre_hooks:
            saved = _prepared_by_hooks(optimizer, saved, path)
        saved = _in_our_order(optimizer, saved, path)
    try:
        step = managed(optimizer)
        room = step.kept.room(optimizer) if step is not None else {}
        check_groups(optimizer, known_rules(optimizer), saved.param_groups, saved.states, room)
        if saved.loss_scaler is not None:
            LossScaler.of_state(saved.loss_scaler)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; the optimizer is as it was") from error
    return saved


def check_options(optimizer: Optimizer, doing: str) -> None:
    """See whether the options of an optimizer that is to be saved would be taken by a load.

    Parameters
    ----------
    doing
        What saves it, in words.

    Raises
    ------
    CheckpointError
        Naming groups and options.
    """
    rules = known_rules(optimizer)
    faults = [
        f"group {index}: {fault}"
        for index, group in enumerate(optimizer.param_groups)
        for fault in group_faults(None if rules is None else rules.of_group(group).name, group, group)
    ]
    if faults:
        raise CheckpointError(
            f"{doing}: the optimizer has options with which it could not be loaded: {listed(faults, '; ', width=300)}. "
            "Nothing was written, and what was there before is as it was: change them in optimizer.param_groups"
        )


def check_signs(optimizer: Optimizer, saved: SavedOptimizer, path: Path) -> None:
    """Look at the values of what would be kept without its signs, which is little or nothing.

    Raises
    ------
    CheckpointError
        If one is negative; the optimizer is as it was.
    """
    step = managed(optimizer)
    if step is None:
        return
    try:
        for parameter, state in _pairs(optimizer, saved):
            step.kept.check_signs(parameter, state, read=real)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; the optimizer is as it was") from error


def gathered(states: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """All states in RAM, as a state dict has them."""
    found = {index: {key: real(value) for key, value in state.items()} for index, state in states.items()}
    for state in found.values():
        if "step" in state:
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu")
    return found


def real(value: Any) -> Any:
    """The tensor of a `Source`, and everything else itself."""
    return value.read() if isinstance(value, Source) else value


def _pairs(optimizer: Optimizer, saved: SavedOptimizer) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """The parameters that have a saved state."""
    return [
        (parameter, saved.states[index])
        for group, of in zip(optimizer.param_groups, saved.param_groups, strict=True)
        for parameter, index in zip(group["params"], of["params"], strict=True)
        if index in saved.states
    ]


def _prepared_by_hooks(optimizer: ManagedOptimizer, saved: SavedOptimizer, path: Path) -> SavedOptimizer:
    """What the hooks of users make of a checkpoint. They may look at all of it, so it has to be in RAM."""
    state_dict = {"state": gathered(saved.states), "param_groups": saved.param_groups}
    changed = optimizer.before_load_state_dict(state_dict)
    try:
        states, groups = changed["state"], changed["param_groups"]
        return replace(saved, states={i: _sources(state) for i, state in states.items()}, param_groups=list(groups))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: a hook made something else than a state dict of it ({error!r})") from error


def _in_our_order(optimizer: ManagedOptimizer, saved: SavedOptimizer, path: Path) -> SavedOptimizer:
    """Order each saved group as ours: by name where all names are known on both sides, else names must agree."""
    ours = [
        _names_like(group, optimizer, of) for group, of in zip(optimizer.param_groups, saved.param_groups, strict=False)
    ]
    theirs = [group.get("param_names") or [None] * len(group["params"]) for group in saved.param_groups]
    if [len(g["params"]) for g in optimizer.param_groups] != [len(names) for names in theirs]:
        return saved  # the numbers of parameters are compared later
    by_name = not any(name is None for names in (*ours, *theirs) for name in names)
    groups, faults = [], []
    for i, (mine, other, group) in enumerate(zip(ours, theirs, saved.param_groups, strict=True)):
        if by_name:
            faults += [f"{name} is missing from group {i}" for name in mine if name not in other]
            faults += [f"{name} is unexpected in group {i}" for name in other if name not in mine]
            place = dict(zip(other, group["params"], strict=True))
            groups.append({**group, "params": [place.get(name) for name in mine]})
        else:
            pairs = zip(mine, other, strict=True)
            faults += [f"{b} in group {i} is in the place of {a}" for a, b in pairs if a and b and a != b]
            groups.append(group)
    if faults:
        raise CheckpointError(f"{path} does not fit the optimizer, which is as it was: {listed(faults, '; ')}")
    return replace(saved, param_groups=groups)


def _names_like(
    group: Mapping[str, Any], optimizer: ManagedOptimizer, saved: Mapping[str, Any]
) -> Sequence[str | None]:
    """The names of a group; the optimizer's own `param_names` where a saved group has the same."""
    given: Sequence[str] = group.get("param_names") or ()
    if given and set(given) == set(saved.get("param_names") or ()):
        return list(given)
    return names_of(optimizer, group)


def _sources(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: Source.of(v) if isinstance(v, Tensor) and k != "step" else v for k, v in state.items()}
