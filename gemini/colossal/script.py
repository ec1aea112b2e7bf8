"""Small things that training scripts call."""

import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch


def set_seed(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def ensure_path_exists(filename: str | Path) -> None:
    """Make the folder that a file is to be written to."""
    Path(filename).parent.mkdir(parents=True, exist_ok=True)


def conditional_context(
    context_manager: AbstractContextManager[Any], enable: bool = True
) -> AbstractContextManager[Any]:
    """The context manager, or one that does nothing."""
    return context_manager if enable else nullcontext()
