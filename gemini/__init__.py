"""gemini-memory: train PyTorch models larger than the device.

``import gemini`` loads nothing: each public name is imported from its home on first use (PEP 562). Therefore
``gemini-stat``, which lives in :mod:`gemini.stat` and reads files only, starts without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemini import accelerator as accelerator
    from gemini import cluster as cluster
    from gemini import errors as errors
    from gemini import logging as logging
    from gemini import utils as utils
    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.boosting.averaging import EMA, SWA
    from gemini.boosting.plain import to_torch
    from gemini.checkpoint import named_tensors
    from gemini.initialize import launch, launch_from_slurm, launch_from_torch
    from gemini.lazy import LazyInitContext
    from gemini.lease.budget import Budget
    from gemini.nn.optimizer import HybridAdam
    from gemini.quantization import Quantization

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "SWA",
    "Booster",
    "Budget",
    "GeminiPlugin",
    "HybridAdam",
    "LazyInitContext",
    "Quantization",
    "__version__",
    "launch",
    "launch_from_slurm",
    "launch_from_torch",
    "named_tensors",
    "to_torch",
]

_HOMES = {
    "EMA": "gemini.boosting.averaging",
    "SWA": "gemini.boosting.averaging",
    "Booster": "gemini.booster",
    "GeminiPlugin": "gemini.booster.plugin",
    "HybridAdam": "gemini.nn.optimizer",
    "Quantization": "gemini.quantization",
    "Budget": "gemini.lease.budget",
    "LazyInitContext": "gemini.lazy",
    "launch": "gemini.initialize",
    "launch_from_slurm": "gemini.initialize",
    "launch_from_torch": "gemini.initialize",
    "named_tensors": "gemini.checkpoint",
    "to_torch": "gemini.boosting.plain",
}
_SUBMODULES = frozenset({"accelerator", "cluster", "errors", "logging", "utils"})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
