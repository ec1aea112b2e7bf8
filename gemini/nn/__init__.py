"""Parts of ``torch.nn`` and ``torch.optim`` that gemini-memory replaces."""

from .lr_scheduler import *  # noqa: F403
from .optimizer import *  # noqa: F403
