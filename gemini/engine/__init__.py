"""The engine: brings chunks before units run and lets them go after, by plans made of what was seen before."""

from .engine import Engine, in_backward
from .listener import Listener, StepFacts

__all__ = ["Engine", "Listener", "StepFacts", "in_backward"]
