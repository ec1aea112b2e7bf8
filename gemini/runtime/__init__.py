"""The hot path: PyTorch's events become moves of chunks."""
