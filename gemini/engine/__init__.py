"""The engine: brings chunks before units run and lets them go after, by plans made of what was seen before."""

from .engine import Engine, in_backward

__all__ = ["Engine", "in_backward"]
