"""The user's entry: a `Booster` with a plugin."""

from .booster import Booster
from .plugin import Plugin

__all__ = ["Booster", "Plugin"]
