"""Comparing a saved optimizer with the one that is to take it over."""

from typing import Any

from .nn.optimizer import HybridAdam


def check_groups(optimizer: HybridAdam, saved_groups: list[dict[str, Any]], states: dict[int, Any]) -> None:
    """Compare a saved state with the optimizer before anything is changed.

    Raises
    ------
    ValueError
        If the groups or shapes differ, or an option is not supported; all in one message.
    """
    ours, theirs = [len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in saved_groups]
    if ours != theirs:
        raise ValueError(f"the saved optimizer has groups of {theirs} parameters, this one has groups of {ours}")
    faults = [f"{option}=True" for group in saved_groups for option in ("amsgrad", "maximize") if group.get(option)]
    if faults:
        raise ValueError(f"the saved optimizer uses {', '.join(faults)}, which HybridAdam does not support")
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            for slot in optimizer.rule.slots(group):
                value = states.get(index, {}).get(slot.name)
                if value is not None and tuple(value.shape) != tuple(parameter.shape):
                    shapes = f"saved {tuple(value.shape)}, expected {tuple(parameter.shape)}"
                    faults.append(f"{slot.name} of parameter {index}: {shapes}")
    if faults:
        raise ValueError("the saved optimizer does not fit: " + "; ".join(faults))
