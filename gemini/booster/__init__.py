"""The user's entry: a `Booster` with a plugin."""

from .booster import Booster

__all__ = ["Booster"]
