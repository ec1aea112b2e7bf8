"""Optimizers for parameters on any tier: Adam with one definition of its arithmetic, and torch's others as themselves.

::

    acceptance      which optimizers can be boosted, and as what
    managed         ManagedOptimizer, the base of all boosted optimizers; ManagedStep, what does the work once boosted
    hybrid_adam     HybridAdam: groups, states, loading and saving
    elementwise_optimizer    the same for other torch optimizers
    given           an optimizer in whose place boost returned another one

    rules/          what is computed, and which states are kept: Adam, SGD, any element-wise torch optimizer
    kernels/        one Adam step on flat buffers, for each device: numba, Triton, plain torch
    unmanaged/      the Adam step of parameters that are in no chunk

Importing this package imports neither numba nor Triton: the first update does.
"""

from .hybrid_adam import HybridAdam
from .rules.registration import register_elementwise, register_whole_parameter

CPUAdam = FusedAdam = HybridAdam  # ColossalAI's names for Adam on the CPU and on a GPU: here one class does both

__all__ = ["CPUAdam", "FusedAdam", "HybridAdam", "register_elementwise", "register_whole_parameter"]
