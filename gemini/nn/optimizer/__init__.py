"""Adam and AdamW with one definition of the arithmetic for every tier.

::

    hybrid_adam.HybridAdam        the torch.optim.Optimizer: groups, states, loading and saving
      acceptance.accepted         which optimizers can be boosted
      managed.ManagedStep         what takes over when the optimizer is boosted
      prepared.prepare            parameters outside of chunks, all or nothing
      adam_rule.ADAM              Adam as a `rule.Rule`: what states there are, and one step on flat pieces of chunks
      update.adam_update          one flat buffer, dispatched by device
        arithmetic                the definition: hyperparameters -> the float32 scalars of one step (no torch)
        reference                 plain torch, readable, exact; any device
        cpu_kernel                numba, one pass, releases the GIL
        cuda_kernel               Triton, one pass

Importing this package imports neither numba nor Triton: the first update does.
"""

from .hybrid_adam import HybridAdam

__all__ = ["HybridAdam"]
