"""Other people's optimizers that are accepted without being registered, by the names of their modules and classes.

Their packages are not imported. That each is element-wise with the options allowed here was read in its source, and is
tried again at each boost. The trial alone would not do: clipping by the size of an update, say, shows only in a step in
which it is large. So an option that none of these lists has must be off.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from .kind import Kind, always

_TIMM = ("foreach", "maximize", "corrected_weight_decay", "max_lr_snapshot")
_PYTORCH_OPTIMIZER = ("weight_decouple", "fixed_decay", "foreach")
_LR = ("lr", "betas", "eps", "weight_decay")

_KINDS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("lion_pytorch.lion_pytorch", "Lion"): {
        "states": always("exp_avg"),
        "takes_step": False,
        "options": _LR,
    },
    ("timm.optim.lion", "Lion"): {
        "states": always("exp_avg"),
        "takes_step": False,
        "options": (*_LR, *_TIMM),
    },
    ("pytorch_optimizer.optimizer.lion", "Lion"): {
        "states": always("exp_avg"),
        "takes_step": False,
        "counts_in_group": True,
        "options": (*_LR, *_PYTORCH_OPTIMIZER),
    },
    ("timm.optim.nadamw", "NAdamW"): {
        "states": always("exp_avg", "exp_avg_sq"),
        "options": (*_LR, *_TIMM),
    },
    ("adan_pytorch.adan", "Adan"): {
        "states": always("prev_grad", "m", "v", "n"),
        "options": _LR,
    },
    ("timm.optim.adan", "Adan"): {
        "states": always("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"),
        "takes_step": False,
        "counts_in_group": True,
        "options": (*_LR, "no_prox", "foreach"),
    },
    ("pytorch_optimizer.optimizer.adan", "Adan"): {
        "states": always("exp_avg", "exp_avg_sq", "exp_avg_diff", "previous_grad"),
        "takes_step": False,
        "counts_in_group": True,
        "options": (*_LR, *_PYTORCH_OPTIMIZER),
    },
}


def third_party_kind(cls: type[Optimizer]) -> Kind | None:
    """What is known of a class by its name."""
    known = _KINDS.get((cls.__module__, cls.__qualname__))
    return None if known is None else Kind(cls, **known)


def named(kinds: Iterable[tuple[str, str]] = _KINDS) -> list[str]:
    """The packages and classes, for messages."""
    return [f"{module.partition('.')[0]}'s {name}" for module, name in kinds]
