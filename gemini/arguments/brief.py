"""A value as a short text, for messages."""

import os
import reprlib
from typing import Any

LONGEST = 100
_LONGEST_INTEGER_BITS = 128


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = LONGEST


_SHORT = _Short()


def brief(value: Any) -> str:
    """What a value is, in at most about a hundred characters, however large it is."""
    if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER_BITS:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print long ones
    if isinstance(value, type):
        return f"the class {value.__qualname__[:LONGEST]}"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        shape = tuple(value.shape) if hasattr(value, "dtype") else ()
    except (AttributeError, TypeError, RuntimeError):  # a tensor without a shape, such as one that is nested
        return f"a {type(value).__name__}"
    if shape:
        return f"a {type(value).__name__} of shape {shape} and {value.dtype}"
    return _SHORT.repr(value)
