"""Check by a few steps that a rule keeps all that an optimizer of whole parameters keeps."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .rule import Form
from .trial_steps import refuse_changes, refuse_drawing
from .whole_rule import WholeRule

_STEPS = 3
_SIZES = (6, 5, 4, 3, 2)


def check_whole(rule: WholeRule, param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Take a few steps of small tensors as the optimizer does, and with what the rule keeps between steps.

    Raises
    ------
    ValueError
        If the bits differ, the states are not those that the rule knows, or something else changes from step to step.
    """
    tried = set()
    for group in param_groups:
        options = rule.options_of(group)
        for dimensions in sorted({parameter.dim() for parameter in group["params"]}):
            if (key := (repr(options), dimensions)) not in tried:
                tried.add(key)
                _check(rule, options, _SIZES[:dimensions])


@torch.no_grad()
def _check(rule: WholeRule, options: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    ours, state, slots = whole.flatten().clone(), dict[str, Any](), rule.slots(options)
    states = [slot.zeros(ours.numel(), ours.device) for slot in slots]
    form = Form(shape, whole.stride())
    drawn = torch.random.get_rng_state()
    for number in range(1, _STEPS + 1):
        counted = {**options, **dict.fromkeys(rule.kept_in_group, number - 1)}
        gradient = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * 10.0**-number
        whole.grad = gradient.clone()
        kept = rule.run(counted, whole, state)
        refuse_changes(rule, kept)
        _check_state(rule, state, {slot.name: shape for slot in slots} | dict(rule.side(shape)))
        rule.bind(counted, slots)(number, 1.0, None, form).apply(ours, states, gradient.flatten())
    refuse_drawing(rule, drawn)
    pairs = {"the parameter": (ours.view(shape), whole)}
    pairs |= {slot.name: (flat.view(shape), state[slot.name]) for slot, flat in zip(slots, states, strict=True)}
    if different := [what for what, (mine, theirs) in pairs.items() if not torch.equal(mine, theirs)]:
        raise ValueError(
            f"{rule.name} with these options keeps something from step to step that is not known: {different} of a "
            f"tensor of shape {shape} differ. Train it unmanaged"
        )


def _check_state(rule: WholeRule, state: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    counts = "step" in state
    if counts != rule.takes_step:
        raise ValueError(f"{rule.name} is registered with takes_step={rule.takes_step}, and its state says otherwise")
    found = {
        name: tuple(value.shape) if isinstance(value, Tensor) else ()
        for name, value in state.items()
        if name != "step" and value is not None
    }
    if found != dict(wanted):
        raise ValueError(f"{rule.name} keeps {found} of each parameter; it is registered with {dict(wanted)}")
