"""Functions that are called before and after a module runs, also if the module is compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from ..signals import uninterrupted
from ..torch_private import COMPILED_CALL, is_traced, never_compiled
from .attached import Attached

Before = Callable[[nn.Module, Any, Any], Any]
"""Gets module, args and kwargs; returns None or new (args, kwargs)."""
After = Callable[[nn.Module, Any, Any, Any], Any]
"""Gets module, args, kwargs and output (None after an exception); returns None or another output."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """What is installed on a module. On one that is compiled it stays for good."""

    hooks: tuple[RemovableHandle, ...] = ()

    def remove(self) -> None:
        """Take the hooks off the module."""
        for hook in self.hooks:
            hook.remove()


def bracket(module: nn.Module, before: Before, after: After) -> Bracket:
    """Install both on the module, before the user's hooks."""
    before, after = uninterrupted(before), uninterrupted(after)
    if getattr(module, COMPILED_CALL, None) is None:
        first = module.register_forward_pre_hook(Attached(_never_compiled(before)), with_kwargs=True, prepend=True)
        return Bracket((first, module.register_forward_hook(Attached(after), with_kwargs=True, always_call=True)))
    # ``module.compile()``: its hooks are compiled with it, and ours must stay outside.
    compiled: Callable[..., Any] = module.__dict__[COMPILED_CALL]

    def call(*args: Any, **kwargs: Any) -> Any:
        changed = before(module, args, kwargs)
        if changed is not None:
            args, kwargs = changed
        output = None
        try:
            output = compiled(*args, **kwargs)
        finally:
            changed = after(module, args, kwargs, output)
        return output if changed is None else changed

    module.__dict__[COMPILED_CALL] = call
    return Bracket()


def refuse_compilation() -> None:
    """Raise if the caller is being compiled or traced: bringing chunks cannot be part of a graph.

    Raises
    ------
    RuntimeError
        Saying what to compile when.
    """
    # The compiler runs a frame as it is, without asking, if it has neither tensors nor the name ``torch``.
    if torch.compiler.is_compiling():
        _raise_uncompiled()
    if is_traced():
        raise RuntimeError(
            "torch.jit.trace was called on a boosted model, or a part of one, whose parameters move between calls: "
            "trace a plain model that has loaded model.state_dict()"
        )


def _never_compiled(before: Before) -> Before:
    @wraps(before)
    def guarded(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if is_compiling() or is_traced():  # asked here, since it is a call less
            refuse_compilation()
        return before(module, args, kwargs)

    return guarded


# The compiler would only give up compiling this frame, and try the next, if it were to raise from what it runs itself.
@never_compiled
def _raise_uncompiled() -> None:
    raise RuntimeError(
        "torch.compile was called on a boosted model, or a part of one: chunks are brought between its units, which "
        "cannot be compiled. Compile before: booster.boost(torch.compile(model), optimizer), or compile its blocks "
        "before booster.boost"
    )
