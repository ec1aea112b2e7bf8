"""A device that counts every byte, logs every call, and moves data when the test says so."""

from collections.abc import Callable

import torch
from torch import Tensor

from gemini.chunk import Buffer, MemoryBuffer, Tier
from gemini.chunk.memory import Caller, NoDevice, Transfer


class FakeTransfer:
    """A move that happens when someone waits for it, or when the test lets it arrive."""

    def __init__(self, fill: Callable[[], None]) -> None:
        self._fill: Callable[[], None] | None = fill
        self.error: BaseException | None = None
        """Raised by `wait`, if set before the data arrived."""

    def arrive(self) -> None:
        if self._fill is not None and self.error is None:
            self._fill()
            self._fill = None

    def wait(self) -> None:
        if self.error is not None:
            raise self.error
        self.arrive()

    def done(self) -> bool:
        return self._fill is None or self.error is not None


class FakeUpdate:
    """An optimizer update that is over when the test calls `finish`, and fails while `error` is set."""

    def __init__(self, work: Callable[[], None] = lambda: None) -> None:
        self.error: BaseException | None = None
        self.waits = 0
        self._work = work
        self._is_over = False

    def wait(self) -> None:
        self.waits += 1
        if self.error is not None:
            raise self.error
        if not self._is_over:
            self._work()
            self._is_over = True

    def done(self) -> bool:
        return self._is_over or self.error is not None


class FakeBackend:
    """A `DeviceBackend` in RAM with a byte-exact capacity for full copies and homes on DEVICE.

    Attributes
    ----------
    log
        Calls that change something, such as ``("grow", 640)``, in order.
    fail
        Set to make the next call of that name raise.
    """

    device = torch.device("cpu")
    is_ram = True

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.reserved_bytes = 0
        self.log: list[tuple[object, ...]] = []
        self.fail: dict[str, BaseException] = {}
        self.transfers: list[FakeTransfer] = []
        self._grown: set[int] = set()

    def reserve(self, host_bytes: int) -> None:
        self.reserved_bytes = host_bytes

    def home(self, tier: Tier, numel: int, dtype: torch.dtype) -> MemoryBuffer:
        if tier is Tier.DEVICE:
            self._use(numel * dtype.itemsize)
        return MemoryBuffer(tier, torch.zeros(numel, dtype=dtype))

    def release(self, home: MemoryBuffer) -> None:
        if home.tier is Tier.DEVICE:
            self.used_bytes -= home.nbytes

    def take_over(self) -> None:
        pass

    def grow(self, full: Tensor) -> None:
        self._maybe_fail("grow")
        assert full.untyped_storage().nbytes() == 0, "grown twice"
        nbytes = full.numel() * full.element_size()
        self.log.append(("grow", nbytes))
        self._use(nbytes)
        full.untyped_storage().resize_(nbytes)
        self._grown.add(full.data_ptr())

    def shrink(self, full: Tensor) -> None:
        nbytes = full.untyped_storage().nbytes()
        if full.data_ptr() in self._grown:  # a chunk begins with memory that nobody counts yet
            self.log.append(("shrink", nbytes))
            self._grown.remove(full.data_ptr())
            self.used_bytes -= nbytes
        full.untyped_storage().resize_(0)

    def outlast(self, memory: Tensor) -> None:
        pass

    def upload(self, full: Tensor, source: Buffer, after: Transfer | None, background: bool) -> Transfer:
        self._maybe_fail("upload")
        self.log.append(("upload", background))

        def fill() -> None:
            if after is not None:
                after.wait()
            typed = torch.empty(source.numel, dtype=source.dtype)
            source.read(0, typed)
            full.copy_(typed)

        transfer = FakeTransfer(fill)
        self.transfers.append(transfer)
        if not background:
            transfer.wait()
        return transfer

    def download(self, gradient: Tensor, into: Tensor, accumulate: bool) -> None:
        self.log.append(("download", accumulate))
        into.add_(gradient) if accumulate else into.copy_(gradient)

    def store(self, gradient: Tensor, into: Buffer, start: int) -> None:
        self.log.append(("store", start))
        into.write(start, gradient)

    def wait_for_stored(self, into: Buffer) -> None:
        self.log.append(("wait_for_stored",))

    def discard(self) -> None:
        self.log.append(("discard",))

    def caller(self) -> Caller:
        return NoDevice()

    def trim(self) -> None:
        self.log.append(("trim",))

    def synchronize(self) -> None:
        self.log.append(("synchronize",))

    def close(self) -> None:
        self.log.append(("close",))

    def _use(self, nbytes: int) -> None:
        self.used_bytes += nbytes
        assert self.used_bytes <= self.capacity_bytes, f"{self.used_bytes} of {self.capacity_bytes} bytes in use"

    def _maybe_fail(self, name: str) -> None:
        if name in self.fail:
            raise self.fail.pop(name)
