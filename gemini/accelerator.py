"""The device that computes, where ColossalAI has it."""

from .colossal.accelerator import Accelerator, get_accelerator

__all__ = ["Accelerator", "get_accelerator"]
