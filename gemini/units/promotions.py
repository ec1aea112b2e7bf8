"""Float32 that comes unasked into a forward in half precision.

A tensor made by ``torch.ones(8)`` is float32, and so is a buffer. In a model boosted with ``precision="bf16"`` it meets
bfloat16, and by torch's rules of promotion all that follows is float32: more memory, less speed, and no error unless a
layer refuses it. Whoever wants float32 for a while writes ``x.float()`` and comes back, so what is converted is left
alone, and so is what does not leave the module that made it.
"""

import sys
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .nested import tensors_in

HALF = (torch.bfloat16, torch.float16)


class Meeting(NamedTuple):
    """Where a float32 tensor met one in half precision."""

    dtype: torch.dtype
    """Half precision."""
    module: nn.Module
    """Whose forward was running."""
    file: str
    line: int
    names: dict[str, Any]
    """Global ones of the program there."""


class Promotions:
    """Follows the float32 tensors of one forward."""

    def __init__(self) -> None:
        self._computed = WeakTensorKeyDictionary()
        """Float32 tensors that depend on others in half precision, with the meeting that made them so, or None."""

    def saw(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """An operation has run in the forward of a module."""
        made = [each for each in tensors_in(result) if each.dtype is torch.float32 and each.dim()]
        if not made:
            return
        given = [each for each in tensors_in((args, kwargs)) if each.is_floating_point() and each.dim()]
        halves = [each.dtype for each in given if each.dtype in HALF]
        full = [each for each in given if each.dtype is torch.float32 and not isinstance(each, nn.Parameter)]
        known = [each for each in full if each in self._computed]
        if not halves and not known:
            return  # float32 among itself, such as an embedding of positions
        meeting = next((found for each in known if (found := self._computed[each]) is not None), None)
        if meeting is None and halves and len(known) < len(full):
            meeting = _meeting(halves[0], module)
        for each in made:
            self._computed[each] = meeting

    def leaves(self, module: nn.Module, output: Any) -> None:
        """Warn, at the line where they met, if what a module returns is float32 by a meeting in its forward."""
        for tensor in tensors_in(output):
            meeting = self._computed.get(tensor) if tensor.dtype is torch.float32 else None
            if meeting is not None and meeting.module is module:
                _warn(meeting)
                return


def _warn(meeting: Meeting) -> None:
    name = str(meeting.dtype).removeprefix("torch.")
    warnings.warn_explicit(
        f"here a float32 tensor meets one in {name}, which makes float32 of what {type(meeting.module).__name__} "
        f"returns. GeminiPlugin(precision=...) lets the model compute in {name}, but its buffers stay as they are, and "
        "torch.ones, torch.arange(...).float() and the like make float32 unless told otherwise; all that follows takes "
        "more memory and time. Write torch.ones(..., dtype=x.dtype) or buffer.to(x.dtype); if float32 is meant, "
        "x.float() says so",
        UserWarning,
        meeting.file,
        meeting.line,
        module=meeting.names.get("__name__"),
        registry=meeting.names.setdefault("__warningregistry__", {}),
    )


def _meeting(dtype: torch.dtype, module: nn.Module) -> Meeting:
    """The line of the program that runs."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_within(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return Meeting(dtype, module, frame.f_code.co_filename, frame.f_lineno, frame.f_globals)


def _is_within(name: str) -> bool:
    return name.startswith(("torch.", "gemini.")) or name in ("torch", "gemini")
