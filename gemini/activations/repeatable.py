"""Whether a block's forward may run again, as far as its modules tell."""

from typing import Any

from torch import nn

from ..torch_private import forward_hooks
from ..units.attached import Attached
from .recompute import Reason

_OF_TORCH = "torch.nn.utils."
"""Modules of hooks that compute a weight from others, before each forward."""


def why_not(block: nn.Module) -> Reason | None:
    """Why a block's forward must not run again; None if nothing speaks against it."""
    for module in block.modules():
        for hook in forward_hooks(module):
            if not _is_harmless(hook):
                where = "" if module is block else f" of its {type(module).__name__}"
                return Reason(f"a forward hook{where} would be called again ({getattr(hook, '__qualname__', hook)})")
    return None


def _is_harmless(hook: Any) -> bool:
    of = getattr(hook, "__self__", hook)
    name = type(of).__module__ or ""
    return isinstance(hook, Attached) or name.startswith((_OF_TORCH, "gemini."))
