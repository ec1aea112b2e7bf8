"""What to add to torch's errors about dtypes in a model whose parameters compute in half precision.

Such a model was often written for float32, and makes tensors of its own in its forward: an initial state of zeros, a
time embedding, a buffer to add into. torch then says which two dtypes met, but neither where nor why.
"""

import re
from pathlib import PurePath
from types import TracebackType

import torch
from torch import nn

from ..errors import GeminiError

_ABOUT_DTYPES = re.compile(r"dtype|scalar type|ScalarType|BFloat16|\bHalf\b|should be the same")
_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def explain_dtypes(error: BaseException, model: nn.Module, compute_dtype: torch.dtype | None) -> None:
    """Add to an error's message which module met another dtype and what to do; other errors are left alone.

    The error stays the same object, of the class that torch chose.

    Parameters
    ----------
    compute_dtype
        Of the parameters in use; None for what the model was written in.
    """
    is_torchs = isinstance(error, RuntimeError | TypeError) and not isinstance(error, GeminiError)
    if compute_dtype is None or not is_torchs or not error.args:
        return
    message = error.args[0]
    if not isinstance(message, str) or not _ABOUT_DTYPES.search(message) or _SIGN in message:
        return
    name = str(compute_dtype).removeprefix("torch.")
    innermost, forward = _where(model, error.__traceback__)
    error.args = (
        f"{message}\n{_SIGN}{innermost}, where parameters and inputs are {name}, by "
        f"GeminiPlugin(precision={_PRECISIONS.get(compute_dtype, name)!r}). A tensor that is made in {forward} "
        "torch.zeros, torch.arange and the like needs the dtype of what it meets: torch.zeros(..., dtype=x.dtype). "
        "Where that cannot be changed, boost with GeminiPlugin(precision='fp32') and call the model inside "
        f"torch.autocast({_device_type(model)!r}, dtype=torch.{name})",
        *error.args[1:],
    )


_SIGN = "This was raised in "


def _where(model: nn.Module, traceback: TracebackType | None) -> tuple[str, str]:
    """The module whose method was running when the error was raised, and the forward that may have made the tensor.

    That is its own, or, where it is one of torch's modules, that of the module that called it, with the line.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def called(module: nn.Module) -> str:
        return f"{names[id(module)] or 'the model itself'} ({type(module).__name__})"

    found: nn.Module = model
    maker: nn.Module | None = None
    line = ""
    while traceback is not None:
        frame = traceback.tb_frame
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module) and id(running) in names:
            found = running
            file = frame.f_code.co_filename
            if not frame.f_globals.get("__name__", "").startswith(("torch.", "gemini.")):
                maker, line = running, f"{PurePath(file).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    if maker is None or maker is found:
        return called(found), "its forward by"
    return called(found), f"the forward of {called(maker)}, which calls it in {line}, by"


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in nn.Module.parameters(model)), "cpu")
