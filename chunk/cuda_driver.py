"""What CUDA (and ROCm) can do beyond torch's interface for any accelerator."""

import torch
from torch import Tensor

from .accelerator_driver import AcceleratorDriver
from .host_arena import registered_block


class CudaDriver(AcceleratorDriver):
    """One CUDA device.

    Full copies have a memory pool of their own: they come and go in each step in the same order, so that after the
    first steps nothing is asked of the system any more, and activations never lie between them. One storage per chunk
    stays what views of it hold on to; the pool is where its bytes come from.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._pool = torch.cuda.MemPool()

    def allocate(self, full: Tensor) -> None:
        with torch.cuda.use_mem_pool(self._pool, self.device):
            super().allocate(full)

    def host_block(self, nbytes: int, pin: bool) -> Tensor:
        # Registered, because torch's allocator of page-locked memory rounds up to a power of two.
        return registered_block(nbytes, self.lock if pin else _lock_nothing, self.unlock)

    def lock(self, address: int, nbytes: int) -> bool:
        """Page-lock RAM; False if the system refuses."""
        if int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0:
            return True
        try:  # the failure is remembered, and the next kernel would be blamed for it
            torch.zeros(1, device=self.device).add_(1)
        except RuntimeError:
            pass
        return False

    def unlock(self, address: int) -> None:
        torch.cuda.synchronize(self.device)  # a fetch that is of no use any more may still read it
        torch.cuda.cudart().cudaHostUnregister(address)


def _lock_nothing(address: int, nbytes: int) -> bool:
    return False
