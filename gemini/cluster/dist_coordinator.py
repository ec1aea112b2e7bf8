"""`DistCoordinator`, where ColossalAI has it."""

from ..colossal.coordinator import DistCoordinator

__all__ = ["DistCoordinator"]
