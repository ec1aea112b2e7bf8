"""Keys of a parameter group: ours, and those that ``torch.optim.AdamW`` needs to load our state."""

from collections.abc import Mapping
from typing import Any

from ..kernels.arithmetic import AdamHyper
from .option_ranges import group_faults

# torch.optim.AdamW's keys that mean nothing to us. They are kept so that states load in both directions.
TORCH_DEFAULTS: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}

_REFUSED = ("amsgrad", "maximize", "differentiable")


def completed(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``group`` with what it lacks taken from ``defaults``, validated.

    ``adamw_mode`` (ColossalAI's word) and ``decoupled_weight_decay`` (torch's) are one option; the first one rules.

    Raises
    ------
    ValueError
        If a hyperparameter is out of range, or an option asks for what this optimizer does not do.
    """
    full = {**defaults, **group}
    if "adamw_mode" not in group and "decoupled_weight_decay" in group:
        full["adamw_mode"] = group["decoupled_weight_decay"]
    full["decoupled_weight_decay"] = full["adamw_mode"]
    if faults := group_faults("Adam", {}, full):
        raise ValueError("; ".join(faults))
    refuse_options(full)
    AdamHyper.of_group(full)
    return full


def refuse_options(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if ``group`` switches on an option of torch's Adam that ``HybridAdam`` does not have."""
    for name in _REFUSED:
        if group.get(name):
            raise ValueError(f"HybridAdam does not support {name}=True; set it to False, or stay with torch.optim")
