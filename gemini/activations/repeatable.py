"""Whether a block's forward may run again, as far as its modules tell."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..torch_private import forward_hooks, global_forward_hooks, own_parameters
from ..units.attached import Attached
from .module_state import Place

_OF_TORCH = "torch.nn.utils."
"""Modules of hooks that compute a weight from others, before each forward."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a forward cannot run again with the same result."""

    text: str
    """What it does, in words, as in: "it changes its input in place"."""
    changing: tuple[Place, ...] = ()
    """The tensors of its modules that it changes. With copies of these it can run again next time."""
    is_passing: bool = False
    """The next call may be able to run again."""


def why_not(block: nn.Module) -> Reason | None:
    """Why a block's forward must not run again; None if nothing speaks against it."""
    if any(not _is_harmless(hook) for hook in global_forward_hooks()):
        return Reason("a forward hook on all modules would be called again", is_passing=True)
    for module in block.modules():
        if not all(each is None or isinstance(each, nn.Parameter) for each in own_parameters(module).values()):
            return Reason("other tensors took the place of its parameters for the call", is_passing=True)
        for hook in forward_hooks(module):
            if not _is_harmless(hook):
                where = "" if module is block else f" of its {type(module).__name__}"
                return Reason(f"a forward hook{where} would be called again ({getattr(hook, '__qualname__', hook)})")
    return None


def _is_harmless(hook: Any) -> bool:
    of = getattr(hook, "__self__", hook)
    name = type(of).__module__ or ""
    return isinstance(hook, Attached) or name.startswith((_OF_TORCH, "gemini."))
