"""Adapters for training frameworks; each imports its framework and is imported only where that is used.

``gemini.integrations.hugging_face``: a callback and a mixin for ``transformers.Trainer``.
``gemini.integrations.lightning``: a strategy and a callback for Lightning.
"""
