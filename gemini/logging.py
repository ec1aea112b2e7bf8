"""Loggers that know ranks, where ColossalAI has them. Our own modules use Python's ``logging``."""

from .colossal.logger import DistributedLogger, disable_existing_loggers, get_dist_logger

__all__ = ["DistributedLogger", "disable_existing_loggers", "get_dist_logger"]
