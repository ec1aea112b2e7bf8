"""`DPPluginBase`, where ColossalAI's scripts that annotate a plugin import it from."""

from gemini.colossal.plugin import DPPluginBase

__all__ = ["DPPluginBase"]
