"""The memory of one Adam step, shared between our process and the peers': the same pages for all, so that nobody has
better ones by luck (which pages a process gets made up to 1.6 times of a difference). Needs nothing of ours.
"""

import mmap
import os

import torch
from torch import Tensor

# Bytes a parameter.
FIELDS = {
    "param": torch.float32,
    "exp_avg": torch.float32,
    "exp_avg_sq": torch.float32,
    "grad": torch.float32,
    "grad16": torch.bfloat16,
    "out16": torch.bfloat16,
    "low16": torch.int16,
}
# Buffers begin at different cache lines of a page, as the chunk manager's homes do.
_COLOUR_BYTES = 832


def create(numel: int) -> int:
    """A file in memory, without a name, that is large enough; its descriptor."""
    fd = os.memfd_create("bench", 0)
    os.ftruncate(fd, sum(_room(numel, dtype) for dtype in FIELDS.values()))
    os.set_inheritable(fd, True)
    return fd


def _room(numel: int, dtype: torch.dtype) -> int:
    return -(-numel * dtype.itemsize // 4096) * 4096 + 4096


class Buffers:
    """Tensors by name; their values do not matter."""

    def __init__(self, fd: int, numel: int) -> None:
        memory = mmap.mmap(fd, 0)
        start = 0
        found: dict[str, Tensor] = {}
        for i, (name, dtype) in enumerate(FIELDS.items()):
            offset = start + i % 4 * _COLOUR_BYTES
            found[name] = torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset)
            start += _room(numel, dtype)
        self.param, self.exp_avg, self.exp_avg_sq = found["param"], found["exp_avg"], found["exp_avg_sq"]
        self.grad, self.grad16 = found["grad"], found["grad16"]
        self.out16, self.low16 = found["out16"], found["low16"]

    def fill(self) -> None:
        self.param.normal_()
        self.grad.normal_()
        self.grad16.copy_(self.grad)
