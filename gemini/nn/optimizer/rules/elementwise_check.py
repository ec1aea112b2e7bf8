"""Check by a few steps that an optimizer is element-wise.

A later torch, or an unforeseen option, may compute a piece otherwise than the whole, and chunks would train to other
numbers.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .elementwise_rule import ElementwiseRule, ElementwiseUpdate
from .rule import Form
from .trial_steps import refuse_changes, refuse_drawing

_NUMEL = 1003
_CUTS = (0, 1, 34, 130, 517, 1000, _NUMEL)
"""No multiples of a vector's length, so that vector loops and their remainders change places."""
_STEPS = 4


def check_elementwise(rule: ElementwiseRule, param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Take a few steps of a small tensor as a whole and in pieces, with the options of each group.

    Raises
    ------
    ValueError
        If the bits differ, the states are not those that the rule knows, or something else changes from step to step.
    """
    tried = set()
    for group in param_groups:
        options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        if (key := repr(options)) not in tried:
            tried.add(key)
            _check(rule, {**options, "lr": options.get("lr") or 1e-3})


@torch.no_grad()
def _check(rule: ElementwiseRule, options: Mapping[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    value = torch.randn(_NUMEL, generator=generator, **plain)
    gradients = [torch.randn(_NUMEL, generator=generator, **plain) * 10.0**-i for i in range(_STEPS)]
    names = [slot.name for slot in rule.slots(options)]
    sides = list(rule.side((_NUMEL,)))
    drawn = torch.random.get_rng_state()
    first = {name: torch.full((_NUMEL,), rule.initial(name), **plain) for name in names}

    def at_step(number: int) -> Mapping[str, Any]:
        return {**options, **dict.fromkeys(rule.kept_in_group, number - 1)}

    whole, numbers = value.clone(), [dict[str, Tensor]()]
    state = rule.state_before(1, {name: tensor.clone() for name, tensor in first.items()}, is_fresh=True)
    for number, gradient in enumerate(gradients, 1):
        whole.grad = gradient.clone()
        kept = rule.run(at_step(number), whole, state)
        _check_state(rule, state, names if rule.keeps_state(options) else [], sides, number)
        numbers.append({name: torch.as_tensor(state[name]).clone() for name in sides})
        refuse_changes(rule, kept)

    pieces, states = value.clone(), {name: tensor.clone() for name, tensor in first.items()}
    for number, gradient in enumerate(gradients, 1):
        make, form = rule.bind(at_step(number), rule.slots(options)), Form((_NUMEL,), (1,), numbers[number - 1])
        update = make(number, 1.0, None, form)
        for start, stop in pairwise(_CUTS):
            cut = slice(start, stop)
            update.apply(pieces[cut], [states[name][cut] for name in names], gradient[cut])
        if isinstance(update, ElementwiseUpdate):
            found, told = update.side_after(), numbers[number]
            if different := [name for name in sides if not torch.equal(found[name], told[name])]:
                raise ValueError(f"{rule.name}: {', '.join(different)} depend on the parameter's elements")

    refuse_drawing(rule, drawn)
    compared = {"the parameter": (pieces, whole), **{name: (states[name], state.get(name)) for name in names}}
    different = [what for what, (ours, theirs) in compared.items() if not _same(ours, theirs)]
    if different:
        forms = [option for option in ("foreach", "fused") if options.get(option)]
        raise ValueError(
            f"{rule.name} with these options is not element-wise: pieces of a tensor get other numbers than the whole "
            f"({', '.join(different)}), and chunks are updated in pieces. "
            + (f"Leave out {' and '.join(f'{form}=True' for form in forms)}" if forms else "Train it unmanaged")
        )


def _check_state(
    rule: ElementwiseRule, state: Mapping[str, Any], names: list[str], sides: list[str], number: int
) -> None:
    counted = int(state["step"]) if "step" in state else None
    if counted != (number if rule.takes_step else None):
        raise ValueError(
            f"{rule.name} has the step {counted} in its state after {number} steps; it is registered with "
            f"takes_step={rule.takes_step}"
        )
    found = [name for name, value in state.items() if name != "step" and value is not None]
    if sorted(found) != sorted([*names, *sides]):
        raise ValueError(f"{rule.name} keeps {found or 'nothing'} for each parameter; it is registered with {names}")
    for name in names:
        value = state[name]
        if not isinstance(value, Tensor) or value.shape != (_NUMEL,) or value.dtype is not torch.float32:
            what = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{rule.name}: {name} must be float32 and have the parameter's shape, it is a {what}")


def _same(ours: Tensor, theirs: Tensor | None) -> bool:
    return theirs is None or torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
