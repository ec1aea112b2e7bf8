"""Parts of ``torch.nn`` and ``torch.optim`` that gemini-memory replaces."""
