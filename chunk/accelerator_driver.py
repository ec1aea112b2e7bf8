"""The calls into a device that the backend is made of, by torch's interface for any accelerator.

An imitation of these tests the backend's logic without a device.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in a lane."""

    def hold(self) -> None:
        """Let the current stream go on only when the lane has got here. The caller does not wait."""

    def wait(self) -> None:
        """Wait until the lane has got here."""

    def reached(self) -> bool: ...


class Lane(Protocol):
    """A stream: what is put in is done in this order, some time later."""

    def follow_current(self) -> None:
        """What is put in from now on is done after all that the current stream has been given up to here."""

    def entered(self) -> AbstractContextManager[None]:
        """Have it as the current stream of this thread."""

    def put(self, work: Callable[[], object]) -> None:
        """Have work done; its kernels and copies must not wait for the device."""

    def mark(self) -> Mark:
        """The place behind what has been put in."""


class AcceleratorDriver:
    """One device. Each thread has a current stream of its own: a user may train in any, and calls us in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def lane(self) -> Lane:
        """A stream beside that in which the user computes."""
        return _Stream(torch.Stream(self.device))

    def current(self) -> Lane:
        """The stream that this thread is in; equal to what other calls return for it."""
        return _Stream(torch.accelerator.current_stream(self.device))

    def allocate(self, full: Tensor) -> None:
        """Give a storage its bytes, free for use behind what the current stream has been given."""
        full.untyped_storage().resize_(full.numel() * full.element_size())

    def release(self, full: Tensor) -> None:
        """Take them away, behind the work in the stream that they were allocated in."""
        full.untyped_storage().resize_(0)

    def outlast(self, memory: Tensor) -> None:
        """Give memory of the device back only behind what the current stream has been given until then."""
        memory.record_stream(torch.accelerator.current_stream(self.device))

    def host_block(self, nbytes: int, pin: bool) -> Tensor:
        """Zeros in RAM (uint8); page-locked if ``pin``, and if the system allows it.

        Copies from and to page-locked memory run beside everything else.
        """
        try:
            return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pin)
        except RuntimeError:
            if not pin:
                raise
            return torch.zeros(nbytes, dtype=torch.uint8)

    def is_host(self, tensor: Tensor) -> bool:
        """True for memory on the other side of the link."""
        return tensor.device.type == "cpu"

    def trim(self) -> None:
        """Give cached memory back to the system."""
        torch.accelerator.empty_cache()


class _Stream:
    """Equal to others of the same stream."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and self._stream == other._stream

    def __hash__(self) -> int:
        return hash(self._stream)

    def follow_current(self) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._stream.device))

    @contextmanager
    def entered(self) -> Iterator[None]:
        # ``with stream`` is newer than our oldest torch.
        before = torch.accelerator.current_stream(self._stream.device)
        torch.accelerator.set_stream(self._stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def put(self, work: Callable[[], object]) -> None:
        with torch.no_grad(), self.entered():
            work()

    def mark(self) -> Mark:
        return _Event(self._stream)


class _Event:
    def __init__(self, stream: torch.Stream) -> None:
        self._device = stream.device
        self._event = torch.Event(stream.device)
        self._event.record(stream)

    def hold(self) -> None:
        torch.accelerator.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()  # lets other Python threads run

    def reached(self) -> bool:
        return bool(self._event.query())
