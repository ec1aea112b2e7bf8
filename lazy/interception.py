"""The two functions that read weights below torch's hooks, replaced while a context is open anywhere.

The first context puts the replacements in place and the last one takes them away, also from modules that were imported
in between. A replacement looks whether the calling thread is in a context and otherwise
calls the original, so that other threads see no difference.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from . import torch_files
from .session import active_tape
from .weight_files import LazyFile, open_file

_load = torch.load
_lock = threading.Lock()
_open_contexts = 0


def open_lazily(filename: str | os.PathLike[str], framework: str, device: Any = "cpu", **options: Any) -> Any:
    """Open a safetensors file; inside a context its tensors are lazy."""
    tape = active_tape()
    if tape is None or framework not in ("pt", "torch", "pytorch"):
        return open_file(filename, framework, device=device, **options)
    return LazyFile(tape, filename, device, options)


@wraps(_load)
def load_lazily(f: Any, *args: Any, **kwargs: Any) -> Any:
    tape = active_tape()
    if tape is None:
        return _load(f, *args, **kwargs)
    return torch_files.load(tape, _load, f, *args, **kwargs)


@contextmanager
def reading_lazily() -> Iterator[None]:
    """Make reads of weight files lazy in the threads that are in a context."""
    global _open_contexts
    with _lock:
        _open_contexts += 1
        if _open_contexts == 1:
            _replace("safe_open", open_file, open_lazily)
            _replace("load", _load, load_lazily)
    try:
        yield
    finally:
        with _lock:
            _open_contexts -= 1
            if _open_contexts == 0:
                _replace("safe_open", open_lazily, open_file)
                _replace("load", load_lazily, _load)


def _replace(name: str, old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})  # asking the module itself would make some of them import more
        if names.get(name) is old:
            names[name] = new
