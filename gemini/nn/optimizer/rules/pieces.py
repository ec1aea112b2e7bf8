"""Torch operations over flat buffers in pieces: small enough for the caches, several at once, all or nothing."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.kernel_pool import default_pool

_CPU_PIECE_NUMEL, _ACCELERATOR_PIECE_NUMEL = 1 << 18, 1 << 23
"""A CPU's piece and its temporaries are some MiB, near the caches, and long enough for Python not to matter: with half
of it two threads were no faster than one (docs/benchmarks.md). A GPU is fast with large kernels only."""
_AT_ONCE = 16
"""Pieces in work at most: each has temporaries, and memory has been saturated long before."""


def atomic_numel(device: torch.device) -> int:
    """Elements that are in work at once, and so take effect together."""
    pieces = min(default_pool().threads, _AT_ONCE) if device.type == "cpu" else 1
    return pieces * _piece_numel(device)


def groups(numel: int, device: torch.device) -> Iterator[list[slice]]:
    """The pieces of a buffer, those together that are in work at once."""
    size, together = _piece_numel(device), atomic_numel(device)
    for start in range(0, numel, together):
        stop = min(start + together, numel)
        yield [slice(begin, min(begin + size, stop)) for begin in range(start, stop, size)]


def all_of(param: Tensor) -> list[slice]:
    """The pieces of a buffer."""
    numel, size = param.numel(), _piece_numel(param.device)
    return [slice(start, min(start + size, numel)) for start in range(0, numel, size)]


def scratch(param: Tensor) -> deque[Tensor]:
    """A float32 tensor as long as a piece for each thread that may work at once; take one and put it back."""
    numel = min(param.numel(), _piece_numel(param.device))
    threads = default_pool().threads if param.device.type == "cpu" else 1
    return deque(torch.empty(numel, dtype=torch.float32, device=param.device) for _ in range(threads))


def run(work: Callable[[slice], object], pieces: Sequence[slice], device: torch.device) -> None:
    """Call ``work`` with each piece, without autograd; on the CPU by the threads of the process.

    A device is kept busy by one thread, and kernels of others would go into other streams.
    """

    def alone(piece: slice) -> None:
        with torch.no_grad():  # holds for one thread only
            work(piece)

    if device.type == "cpu":
        default_pool().run(alone, pieces)
    else:
        for piece in pieces:
            alone(piece)


def run_or_put_back(work: Callable[[slice], None], pieces: Sequence[slice], written: Sequence[Tensor]) -> None:
    """The same for ``work`` that may raise in the middle: then what it writes is as before, in all pieces."""
    before: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def keeping(piece: slice) -> None:
        before[piece.start] = [(tensor[piece], tensor[piece].clone()) for tensor in written]
        work(piece)

    try:
        run(keeping, pieces, written[0].device)
    except BaseException:
        with torch.no_grad():
            for kept in before.values():
                for tensor, value in kept:
                    tensor.copy_(value)
        raise


def _piece_numel(device: torch.device) -> int:
    return _CPU_PIECE_NUMEL if device.type == "cpu" else _ACCELERATOR_PIECE_NUMEL
