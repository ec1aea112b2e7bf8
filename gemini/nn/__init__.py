"""Parts of ``torch.nn`` and ``torch.optim`` that gemini-memory replaces."""

from . import lr_scheduler, optimizer
from .lr_scheduler import *  # noqa: F403
from .optimizer import *  # noqa: F403

__all__ = ["lr_scheduler", "optimizer"]
__all__ += lr_scheduler.__all__
__all__ += optimizer.__all__
