"""Optimizers for parameters on any tier: Adam with one definition of its arithmetic, and torch's element-wise ones.

::

    hybrid_adam.HybridAdam        the torch.optim.Optimizer: groups, states, loading and saving
      managed.ManagedOptimizer    what all boosted optimizers have in common
      managed.ManagedStep         what takes over when the optimizer is boosted
      prepared.prepare            parameters outside of chunks, all or nothing
      adam_rule.ADAM              Adam as a `rule.Rule`: what states there are, and one step on flat pieces of chunks
      update.adam_update          one flat buffer, dispatched by device
        arithmetic                the definition: hyperparameters -> the float32 scalars of one step (no torch)
        reference                 plain torch, readable, exact; any device
        cpu_update, cpu_kernel    numba, one pass, releases the GIL
        cuda_kernel               Triton, one pass

    elementwise_optimizer.ElementwiseOptimizer    the same for other torch optimizers that are element-wise
      elementwise                 which these are, and `register_elementwise` for more
      elementwise_check           trying that, instead of believing it
      elementwise_rule, sgd       their rule: torch's own step on flat pieces of chunks

    acceptance.accepted           which optimizers can be boosted, and as what

Importing this package imports neither numba nor Triton: the first update does.
"""

from .elementwise import register_elementwise
from .hybrid_adam import HybridAdam

__all__ = ["HybridAdam", "register_elementwise"]
