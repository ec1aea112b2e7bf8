"""Parameters whose dtype `GeminiPlugin(precision=...)` overrules."""

import warnings
from collections.abc import Sequence

import torch

from ..packing.packing import Packing

_SHOWN = 4
_CALLS_UP_TO_THE_USER = 9
"""From here over `_decide`, `_boost`, `boost_model`, the plugin and the booster, both of which are decorated."""


def warn_of_other_dtypes(packing: Packing, precision: str) -> None:
    """Warn if parameters will compute in another dtype than the model gave them.

    A model that is float32 throughout is the normal case: it has said nothing about dtypes, and its masters are
    float32. One with other dtypes has chosen them, and plain PyTorch would compute in them.
    """
    if all(parameter.dtype is torch.float32 for parameter in packing.parameters):
        return
    changed: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for plan in packing.plans:
        for slot in plan.layout.slots:
            had = packing.parameters[slot.key].dtype
            if had is not plan.compute_dtype:
                changed.setdefault((had, plan.compute_dtype), []).append(slot.name)
    if not changed:
        return
    described = "; ".join(
        f"{len(names)} from {_short(had)} to {_short(becomes)} ({_listed(names)})"
        for (had, becomes), names in changed.items()
    )
    warnings.warn(
        f"precision={precision!r} overrules the dtypes of some parameters: {described}. Here all parameters compute in "
        "one dtype, and their masters are float32. If that is meant, convert the model before boost (model.float()); "
        "if not, choose precision='keep', with which each parameter computes in its own",
        UserWarning,
        stacklevel=_CALLS_UP_TO_THE_USER,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
