"""Calling something before and after a module runs, also where the module is compiled."""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

Before = Callable[[nn.Module, Any, Any], Any]
"""Gets module, args and kwargs; returns None or new (args, kwargs)."""
After = Callable[[nn.Module, Any, Any, Any], Any]
"""Gets module, args, kwargs and output (None after an exception); returns None or another output."""


def is_compiled(module: nn.Module) -> bool:
    """True for what ``torch.compile(module)`` returns and for a module that had its own ``compile`` called."""
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds, and who compiled has done so
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def bracket(module: nn.Module, before: Before, after: After) -> None:
    """Install both on the module, before the user's hooks."""
    if getattr(module, "_compiled_call_impl", None) is None:
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        module.register_forward_hook(after, with_kwargs=True, always_call=True)
        return
    # ``module.compile()``: its hooks are compiled with it, and ours must stay outside.
    compiled: Callable[..., Any] = module.__dict__["_compiled_call_impl"]

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

    module.__dict__["_compiled_call_impl"] = call
