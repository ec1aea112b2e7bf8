"""The calls into CUDA that the backend is made of. Whoever imitates these can test its logic without a device."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in a lane."""

    def hold_compute(self) -> None:
        """Let the compute stream go on only when the lane has got here. The caller does not wait."""

    def wait(self) -> None:
        """Wait until the lane has got here."""

    def reached(self) -> bool: ...


class Lane(Protocol):
    """A stream beside the compute stream: what is put in is done in this order, some time later."""

    def follow_compute(self) -> None:
        """What is put in from now on is done after all that the compute stream has been given up to here."""

    def put(self, work: Callable[[], object]) -> None:
        """Have work done; its kernels and copies must not wait for the device."""

    def mark(self) -> Mark:
        """The place behind what has been put in."""


class CudaDriver:
    """One device.

    Full copies have a memory pool of their own: they come and go in each step in the same order, so that after the
    first steps nothing is asked of the system any more, and activations never lie between them. One storage per chunk
    stays what views of it hold on to; the pool is where its bytes come from.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.MemPool()

    def lane(self) -> Lane:
        return _Stream(self.device)

    def allocate(self, full: Tensor) -> None:
        """Give a storage its bytes, free for use behind what the compute stream has been given."""
        with torch.cuda.use_mem_pool(self._pool, self.device):
            full.untyped_storage().resize_(full.numel() * full.element_size())

    def release(self, full: Tensor) -> None:
        """Take them away, as soon as the compute stream is through with them."""
        full.untyped_storage().resize_(0)

    def lock(self, address: int, nbytes: int) -> bool:
        """Page-lock RAM, so that copies run beside everything else; False if the system refuses."""
        if int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0:
            return True
        try:  # the failure is remembered, and the next kernel would be blamed for it
            torch.zeros(1, device=self.device).add_(1)
        except RuntimeError:
            pass
        return False

    def unlock(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)

    def is_host(self, tensor: Tensor) -> bool:
        """True for memory on the other side of the link."""
        return tensor.device.type == "cpu"

    def trim(self) -> None:
        """Give cached memory back to the system."""
        torch.cuda.empty_cache()


class _Stream:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def follow_compute(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def put(self, work: Callable[[], object]) -> None:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Mark:
        return _Event(self._stream)


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def hold_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()  # lets other Python threads run

    def reached(self) -> bool:
        return bool(self._event.query())
