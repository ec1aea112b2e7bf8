"""Which process this is, where ColossalAI has it."""

from .dist_coordinator import DistCoordinator

__all__ = ["DistCoordinator"]
