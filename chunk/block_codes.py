"""Runs of numbers to codes and back, by compiled kernels where numba is there. See [Note: Block formats]."""

import ctypes
import logging
from functools import cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import block_format
from .block_format import BLOCK_NUMEL, BlockFormat, levels_of, midpoints_of

_logger = logging.getLogger(__name__)
_WORDS: dict[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
    torch.uint8: np.uint8,
}


@cache
def _kernels() -> ModuleType | None:
    try:
        from . import block_kernel
    except ImportError as error:
        _logger.warning("quantised weights are decoded by torch, several times slower than by numba: %s", error)
        return None
    return block_kernel


def warm_up(form: BlockFormat) -> None:
    """Compile or load the kernels, which takes memory, and more stack than the threads have that fetch."""
    for dtype in (torch.float32, torch.bfloat16):
        decode(*encode(torch.zeros(BLOCK_NUMEL, device="cpu"), form), form, dtype)


def encode(values: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """As `block_format.quantise`, bit by bit."""
    kernels, whole = _kernels(), values.numel() // BLOCK_NUMEL * BLOCK_NUMEL
    if kernels is None or not whole:
        return block_format.quantise(values, form)
    scaled = torch.empty(whole, dtype=torch.float32, device="cpu").copy_(values[:whole])
    absmax = torch.empty(whole // BLOCK_NUMEL, dtype=torch.float32, device="cpu")
    codes = torch.empty(whole // form.codes_per_byte, dtype=torch.uint8, device="cpu")
    kernels.scale(_array(scaled), _array(absmax))
    kernel = kernels.encode_pairs if form.codes_per_byte == 2 else kernels.encode_bytes
    kernel(_array(scaled), _array(midpoints_of(form)), _array(codes))
    if whole == values.numel():
        return codes, absmax
    rest = block_format.quantise(values[whole:], form)
    return torch.cat([codes, rest[0]]), torch.cat([absmax, rest[1]])


def decode(codes: Tensor, absmax: Tensor, form: BlockFormat, dtype: torch.dtype) -> Tensor:
    """As `block_format.dequantise`, bit by bit."""
    out = torch.empty(codes.numel() * form.codes_per_byte, dtype=dtype, device="cpu")
    decode_into(out, codes, absmax, form)
    return out


def decode_into(out: Tensor, codes: Tensor, absmax: Tensor, form: BlockFormat) -> None:
    """The same into memory that is there, as much as it takes; all on CPU, or on a device, where torch does it."""
    kernels, blocks = _kernels() if out.device.type == "cpu" else None, absmax.numel()
    if kernels is None or out.numel() != blocks * BLOCK_NUMEL:  # a last block that is shorter
        out.copy_(block_format.dequantise(codes, absmax, form, out.dtype)[: out.numel()])
    elif form.codes_per_byte == 2:
        table = (levels_of(form) * absmax[:, None]).to(out.dtype)
        kernels.look_up_pairs(_array(codes), _array(table).reshape(blocks, -1), _array(out))
    elif out.dtype is torch.float32:
        kernels.widen_bytes(_array(codes), _array(absmax), _array(out))
    else:
        wide = torch.empty(out.numel(), dtype=torch.float32, device="cpu")
        kernels.widen_bytes(_array(codes), _array(absmax), _array(wide))
        out.copy_(wide)


def _array(tensor: Tensor) -> NDArray[np.generic]:
    """The memory of a dense tensor. Not by ``tensor.numpy()``, which makes a storage unresizable for good."""
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memoryview(memory), dtype=_WORDS[tensor.dtype])
