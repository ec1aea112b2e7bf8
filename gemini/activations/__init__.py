"""Tensors that forwards save for backward: kept, moved to another tier, or computed again."""
