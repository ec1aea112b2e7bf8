"""What ColossalAI's scripts import from its ``utils``. The name is theirs: nothing of our own belongs here."""

from .colossal.accelerator import get_current_device
from .colossal.script import conditional_context, ensure_path_exists, set_seed
from .colossal.timer import MultiTimer, Timer

__all__ = ["MultiTimer", "Timer", "conditional_context", "ensure_path_exists", "get_current_device", "set_seed"]
