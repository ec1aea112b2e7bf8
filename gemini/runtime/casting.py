"""Converting floating-point tensors in nested values, such as a model's inputs and outputs."""

from typing import Any

import torch


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same value with every floating-point tensor of its tuples, lists and dicts in ``dtype``."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        converted = {key: cast(item, dtype) for key, item in value.items()}
        if type(value) is dict:
            return converted
        for key, item in converted.items():  # ModelOutput and its like: keep the class
            value[key] = item
        return value
    if isinstance(value, tuple):
        items = [cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [cast(item, dtype) for item in value]
    return value
