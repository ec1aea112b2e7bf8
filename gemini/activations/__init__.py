"""Tensors that a model saves for its backward: which of them leave the memory that computes, and how they come back."""

from .counts import ActivationCounts
from .make import beside_activations, check_place, make_saving, passing_bytes
from .saving import KeepAll, Offload, Saving

__all__ = [
    "ActivationCounts",
    "KeepAll",
    "Offload",
    "Saving",
    "beside_activations",
    "check_place",
    "make_saving",
    "passing_bytes",
]
