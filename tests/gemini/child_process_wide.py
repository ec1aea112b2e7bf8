"""Run by test_process_wide.py: prints what this process takes of RAM, in bytes, by name."""

import re
import sys
from pathlib import Path

import torch

from gemini.process_wide import bound_kernels, keep_freed_memory, return_freed_memory, trim_large_holes


def taken() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def half_freed() -> list[torch.Tensor]:
    blocks = [torch.ones(1 << 18) for _ in range(256)]
    return blocks[::2]


def blocks() -> None:
    return_freed_memory()
    before = taken()
    held = half_freed()
    print("returned", taken() - before)
    del held
    keep_freed_memory()
    before = taken()
    held = half_freed()
    print("kept", taken() - before)
    trim_large_holes()
    print("trimmed", taken() - before)
    return_freed_memory()
    print("returned_later", taken() - before)
    assert len(held) == 128


def shapes(is_bounded: bool) -> None:
    if is_bounded:
        bound_kernels()
    weight = torch.randn(256, 128, dtype=torch.bfloat16)
    torch.randn(8, 128, dtype=torch.bfloat16) @ weight.t()
    before = taken()
    for rows in range(600):
        torch.randn(64 + rows, 128, dtype=torch.bfloat16) @ weight.t()
    print("grown", taken() - before)


if __name__ == "__main__":
    blocks() if sys.argv[1] == "blocks" else shapes(len(sys.argv) > 2)
