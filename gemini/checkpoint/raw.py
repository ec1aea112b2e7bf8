"""The bytes of a tensor, without copying them; dtypes in files."""

import ctypes

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, readable and writable; the tensor must outlive it.

    Not ``tensor.numpy()``, which knows no bfloat16 and makes the storage unresizable.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def overflows(rounded: Tensor, values: Tensor) -> bool:
    """True if rounding to float16, whose range is small, has made infinities."""
    if rounded.dtype != torch.float16 or values.dtype == torch.float16:
        return False
    return not torch.equal(rounded.isinf(), values.isinf())


def overflow_text(name: str) -> str:
    return f"{name} has values beyond 65504, the largest in float16: save with dtype=torch.bfloat16, or as it is"


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors files."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
