"""What a `Booster` applies: `GeminiPlugin`."""

from .gemini_plugin import GeminiPlugin

__all__ = ["GeminiPlugin"]
