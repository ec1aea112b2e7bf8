"""The Triton kernels in Triton's interpreter on the CPU: bit-equal to the reference, on every machine.

The interpreter runs a kernel's operations in numpy. What it cannot show is what the compiler makes of them.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from adam_cases import (
    GRAD_DTYPES,
    OUT_DTYPES,
    Draw,
    adam_reference,
    buffers,
    hyper,
    marks_are_ties,
    random_bits,
    result,
    same_bits,
    spread,
)
from torch import Tensor

from gemini.chunk import halves, joined, marked, unmarked
from gemini.nn.optimizer.kernels.arithmetic import scalars
from gemini.nn.optimizer.kernels.update import adam_update
from gemini.nn.optimizer.rules.moments import packed, slots

pytestmark = pytest.mark.own_process(TRITON_INTERPRET="1")  # which Triton reads when it is imported

NUMEL = 3001
"""No multiple of the blocks of any kernel."""
HYPERS = [hyper(), hyper(weight_decay=0.1), hyper(weight_decay=0.1, decoupled=False), hyper(beta1=0.3, beta2=0.5)]
draws = pytest.mark.parametrize("draw", [spread, random_bits])


def as_hardware_casts(cast: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter cuts off what bfloat16 has no room for, and gets its subnormal numbers wrong. A GPU rounds."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast_impl(self: Any, source: Any, into: Any) -> Any:
        have, want = source.dtype.scalar, into.scalar
        if (have, want) == (tl.bfloat16, tl.float32):
            bits = source.data.astype(np.uint32) << np.uint32(16)
            return TensorHandle(bits.view(np.float32), want)
        if (have, want) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            nearest = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
            return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, nearest).astype(np.uint16), want)
        return cast(self, source, into)

    return cast_impl


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernels by their form, interpreted."""
    pytest.importorskip("triton")
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    from gemini.nn.optimizer.kernels import cuda_kernel

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", as_hardware_casts(InterpreterBuilder.cast_impl))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with np.errstate(all="ignore"):
        yield cuda_kernel.BY_FORM


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a, b) if b.dtype is torch.uint8 else same_bits(a, b) for a, b in pairs)


@draws
def test_adam_has_the_bits_of_the_reference(kernels: Any, draw: Draw) -> None:
    for h, grad_dtype, out_dtype in itertools.product(HYPERS, GRAD_DTYPES, OUT_DTYPES):
        tensors = buffers(NUMEL, seed=0, draw=draw)
        tensors[3] = tensors[3].to(grad_dtype)
        s = scalars(h, 3, grad_scale=0.3)
        ours, theirs = (result(update, tensors, s, out_dtype) for update in (kernels["fp32"], adam_reference))
        assert equal(ours, theirs), (h, grad_dtype, out_dtype)


@draws
def test_split_masters_have_the_bits_of_the_reference(kernels: Any, draw: Draw) -> None:
    for h, grad_dtype in itertools.product(HYPERS, GRAD_DTYPES):
        param, exp_avg, exp_avg_sq, grad = buffers(NUMEL, seed=0, draw=draw)
        high, low, mark = halves(param)
        theirs = [high, low, exp_avg, marked(exp_avg_sq, mark), grad.to(grad_dtype)]
        ours = [tensor.clone() for tensor in theirs]
        s = scalars(h, 3, grad_scale=0.3)
        adam_update("split", theirs[:-1], theirs[-1], s)
        kernels["split"](ours[:-1], ours[-1], s)
        assert marks_are_ties(ours[1], ours[3])
        a, b = ([joined(high, low, v), m, unmarked(v), high] for high, low, m, v, _ in (ours, theirs))
        assert equal(a, b), (h, grad_dtype)


@pytest.mark.parametrize("kind", ["bf16", "8bit"])
@draws
def test_reduced_states_have_the_bits_of_the_reference(kernels: Any, draw: Draw, kind: str) -> None:
    for h, grad_dtype in itertools.product(HYPERS, GRAD_DTYPES):
        param, exp_avg, exp_avg_sq, grad = buffers(NUMEL, seed=0, draw=draw)
        kept = packed(kind, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
        theirs = [param, *(kept[slot.name] for slot in slots(kind)), grad.to(grad_dtype)]
        ours = [tensor.clone() for tensor in theirs]
        s = scalars(h, 3, grad_scale=0.3)
        adam_update(kind, theirs[:-1], theirs[-1], s)
        kernels[kind](ours[:-1], ours[-1], s)
        assert equal(ours, theirs), (h, grad_dtype)


def test_the_comparison_notices_one_bit(kernels: Any) -> None:
    tensors = buffers(NUMEL, seed=0)
    s = scalars(hyper(), 3)
    ours, theirs = result(kernels["fp32"], tensors, s), result(adam_reference, tensors, s)
    ours[0].view(torch.int32)[7] ^= 1
    assert not equal(ours, theirs)
