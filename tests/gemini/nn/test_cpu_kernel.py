"""The numba kernel: bit-equal to the reference for any length, cut, dtype and value."""

import itertools
import os
import subprocess
import sys
import threading
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_cases import (
    GRAD_DTYPES,
    OUT_DTYPES,
    adam_reference,
    buffers,
    hyper,
    moderate,
    random_bits,
    result,
    same_bits,
    spread,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.nn.optimizer.kernels.arithmetic import scalars

pytest.importorskip("numba")

from gemini.nn.optimizer.kernels import cpu_update, kernel_pool
from gemini.nn.optimizer.kernels.kernel_pool import KernelPool

adam_cpu = partial(cpu_update.adam_cpu, "fp32")

HYPERS = [
    hyper(),
    hyper(weight_decay=0.1, lr=3e-2, beta1=0.95, beta2=0.98, eps=1e-6),
    hyper(weight_decay=0.1, decoupled=False),
    hyper(beta1=0.3, beta2=0.5, weight_decay=0.01),
    hyper(beta1=0.5, decoupled=False, weight_decay=0.2),
    hyper(beta1=0.0, beta2=0.0, eps=0.0),
    hyper(bias_correction=False, weight_decay=0.1),
]
DRAWS = {"moderate": moderate, "spread": spread, "any bits": random_bits}


def check_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for name, x, y in zip(("param", "exp_avg", "exp_avg_sq", "out"), a, b, strict=False):
        assert same_bits(x, y), name
    assert len(a) == len(b)


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    out_dtype=st.sampled_from(OUT_DTYPES),
    hyper_index=st.integers(0, len(HYPERS) - 1),
    draw=st.sampled_from(sorted(DRAWS)),
    step=st.integers(1, 10_000),
    grad_scale=st.sampled_from([1.0, 0.3, 2.0**-16, 1e-30, float("inf")]),
)
def test_the_kernel_equals_the_reference_for_any_length_dtype_and_value(
    numel: int,
    seed: int,
    grad_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    hyper_index: int,
    draw: str,
    step: int,
    grad_scale: float,
) -> None:
    tensors = buffers(numel, seed, DRAWS[draw])
    tensors[3] = tensors[3].to(grad_dtype)
    s = scalars(HYPERS[hyper_index], step, grad_scale)
    check_equal(result(adam_cpu, tensors, s, out_dtype), result(adam_reference, tensors, s, out_dtype))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("hyper_index", range(len(HYPERS)))
@pytest.mark.parametrize("draw", sorted(DRAWS))
def test_the_kernel_equals_the_reference_on_a_long_buffer(hyper_index: int, draw: str) -> None:
    tensors = buffers((1 << 18) + 7, seed=hyper_index, draw=DRAWS[draw])
    s = scalars(HYPERS[hyper_index], 5)
    check_equal(result(adam_cpu, tensors, s, torch.bfloat16), result(adam_reference, tensors, s, torch.bfloat16))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=6), seed=st.integers(0, 2**31))
def test_updating_a_buffer_in_pieces_gives_the_same_bits(cuts: list[int], seed: int) -> None:
    tensors = buffers(1000, seed)
    tensors[3] = tensors[3].bfloat16()
    s = scalars(HYPERS[1], 2)
    whole = result(adam_cpu, tensors, s, torch.bfloat16)
    pieces = [t.clone() for t in tensors] + [torch.empty(1000, dtype=torch.bfloat16)]
    edges = [0, *sorted(cuts), 1000]
    for start, stop in itertools.pairwise(edges):
        param, exp_avg, exp_avg_sq, grad, out = (t[start:stop] for t in pieces)
        adam_cpu((param, exp_avg, exp_avg_sq), grad, s, out)
    check_equal([*pieces[:3], pieces[4]], whole)


@cache
def of_many_threads() -> tuple[list[torch.Tensor], Any, list[torch.Tensor]]:
    """Buffers that are long enough for eight threads, numbers, and what the reference makes of them."""
    tensors, s = buffers(600_001, seed=4), scalars(HYPERS[2], 2)
    assert len(tensors[0]) > 8 * kernel_pool._SMALLEST_SLICE_NUMEL
    return tensors, s, result(adam_reference, tensors, s, torch.float16)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_does_not_change_bits(threads: int) -> None:
    tensors, s, expected = of_many_threads()
    pool = KernelPool(threads)

    def update(*args: object) -> None:
        adam_cpu(*args, pool=pool)  # type: ignore[arg-type]

    try:
        check_equal(result(update, tensors, s, torch.float16), expected)
    finally:
        pool.close()


def test_several_threads_may_update_different_buffers_at_once() -> None:
    tensors = buffers(400_000, seed=5)
    s = scalars(HYPERS[1], 2)
    expected = result(adam_cpu, tensors, s, torch.bfloat16)
    results: list[list[torch.Tensor]] = []

    def work() -> None:
        results.extend(result(adam_cpu, tensors, s, torch.bfloat16) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 30
    for got in results:
        check_equal(got, expected)


def test_the_low_precision_copy_may_take_the_place_of_the_gradient() -> None:
    tensors = buffers(1003, seed=6)
    tensors[3] = tensors[3].bfloat16()
    s = scalars(HYPERS[0], 1)
    expected = result(adam_cpu, tensors, s, torch.bfloat16)
    param, exp_avg, exp_avg_sq, grad = (t.clone() for t in tensors)
    adam_cpu((param, exp_avg, exp_avg_sq), grad, s, grad)
    check_equal([param, exp_avg, exp_avg_sq, grad], expected)


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 3000),
    offset=st.integers(0, 70),
    seed=st.integers(0, 2**31),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    out_dtype=st.sampled_from(OUT_DTYPES[1:]),
    threads=st.sampled_from([1, 3]),
)
def test_a_copy_that_is_streamed_has_the_same_bits_wherever_it_begins(
    numel: int, offset: int, seed: int, grad_dtype: torch.dtype, out_dtype: torch.dtype, threads: int
) -> None:
    tensors = buffers(numel, seed)
    tensors[3] = tensors[3].to(grad_dtype)
    s = scalars(HYPERS[1], 3)
    expected = result(adam_reference, tensors, s, out_dtype)
    around = torch.full((offset + numel + 70,), 7.0, dtype=out_dtype)
    pool = KernelPool(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_update, "STREAMING_PAYS", True)
        patch.setattr(cpu_update, "STREAM_NUMEL", 1)
        patch.setattr(kernel_pool, "_SMALLEST_SLICE_NUMEL", 256)
        param, exp_avg, exp_avg_sq, grad = tensors
        adam_cpu((param, exp_avg, exp_avg_sq), grad, s, around[offset : offset + numel], pool)
    pool.close()
    check_equal([param, exp_avg, exp_avg_sq, around[offset : offset + numel]], expected)
    assert (around[:offset] == 7.0).all()
    assert (around[offset + numel :] == 7.0).all()


def test_a_large_copy_is_streamed_unless_it_takes_the_place_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed: list[bool] = []
    kernel = cpu_update.part_kernels["fp32"]

    def seen(*args: Any) -> None:
        *_, start, stop, streams, _numbers = args
        if stop > start:
            streamed.append(streams)
        kernel(*args)

    monkeypatch.setitem(cpu_update.part_kernels, "fp32", seen)
    monkeypatch.setattr(cpu_update, "STREAMING_PAYS", True)
    monkeypatch.setattr(cpu_update, "STREAM_NUMEL", 5000)
    pool = KernelPool(1)
    s = scalars(HYPERS[0], 1)
    for numel, in_place in ((5000, False), (4999, False), (5000, True)):
        param, exp_avg, exp_avg_sq, grad = buffers(numel, seed=7)
        grad = grad.bfloat16()
        out = grad if in_place else torch.empty(numel, dtype=torch.bfloat16)
        adam_cpu((param, exp_avg, exp_avg_sq), grad, s, out, pool)
    pool.close()
    assert streamed == [True, False, False]


def copied(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert through the kernel: with a learning rate of 0 the parameter stays and ``out`` is its conversion."""
    zero = torch.zeros_like(values)
    out = torch.empty(values.numel(), dtype=dtype)
    adam_cpu((values.clone(), zero.clone(), zero.clone()), zero, scalars(hyper(lr=0.0), 1), out)
    return out


def upper_patterns() -> torch.Tensor:
    return torch.arange(1 << 16).to(torch.int32) << 16


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_to_bfloat16_equals_torch_for_all_upper_halves_and_at_ties(low: int) -> None:
    values = (upper_patterns() | low).view(torch.float32)
    assert same_bits(copied(values, torch.bfloat16), values.to(torch.bfloat16))


@pytest.mark.parametrize("low", [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0xF000, 0xFFFF])
def test_rounding_to_float16_equals_torch_for_all_upper_halves_and_at_ties(low: int) -> None:
    values = (upper_patterns() | low).view(torch.float32)
    assert same_bits(copied(values, torch.float16), values.to(torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gradient_is_widened_exactly(dtype: torch.dtype) -> None:
    grad = torch.arange(1 << 16).to(torch.int16).view(dtype)
    zero = torch.zeros(1 << 16)
    # beta1 = 0 makes exp_avg = fma(0, g - 0, g): the gradient itself, NaN where it is not finite.
    exp_avg = zero.clone()
    adam_cpu((zero.clone(), exp_avg, zero.clone()), grad, scalars(hyper(beta1=0.0), 1))
    finite = grad.isfinite()
    assert torch.equal(exp_avg[finite], grad.float()[finite])
    assert exp_avg[~finite].isnan().all()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )


SMALL_UPDATE = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from adam_cases import adam_fp32, adam_reference, buffers, hyper, result, same_bits
from gemini.nn.optimizer.kernels.arithmetic import scalars
tensors, s = buffers(100, 0), scalars(hyper(), 1)
assert all(map(same_bits, result(adam_fp32, tensors, s), result(adam_reference, tensors, s)))
"""


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    full = tmp_path / "cache"
    full.mkdir()
    # numba finds the folder writable, compiles, and then fails to store: as on a full disk.
    breaking = (
        "import numba.core.caching as c\n"
        "def no_space(*args): raise OSError(28, 'No space left on device')\n"
        "c.IndexDataCacheFile.save = no_space\n"
    )
    done = run_python(breaking + SMALL_UPDATE, NUMBA_CACHE_DIR=str(full))
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr


def test_no_place_for_a_cache_is_done_without() -> None:
    breaking = "import numba.core.caching as c\nc.CacheImpl._locator_classes = []\n"
    done = run_python(breaking + SMALL_UPDATE)
    assert done.returncode == 0, done.stderr
    assert "cannot be kept" in done.stderr


def test_without_numba_the_reference_takes_over_with_one_warning() -> None:
    again = "result(adam_fp32, tensors, s)\n"
    done = run_python("import sys\nsys.modules['numba'] = None\n" + SMALL_UPDATE + again)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("numba cannot be used") == 1


SHOW_ASSEMBLY = """
from gemini.nn.optimizer.kernels.cpu_kernel import part_kernels
from gemini.nn.optimizer.kernels.update import adam_update
tensors[3] = tensors[3].bfloat16()
result(adam_fp32, tensors, s, torch.bfloat16)
halves = [torch.zeros(64, dtype=dtype) for dtype in (torch.bfloat16, torch.int16)]
adam_update('split', (*halves, torch.zeros(64), torch.zeros(64)), torch.zeros(64).bfloat16(), s)
for kernel in ('fp32', 'split'):
    for assembly in part_kernels[kernel].inspect_asm().values():
        print(kernel, *(assembly.count(name) for name in ('vsqrtps', 'vdivps', 'vfmadd', 'vsqrtss', 'vmovnt')))
"""


def test_the_kernels_are_vector_code(tmp_path: Path) -> None:
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("looks for x86 vector instructions")
    # In another process with an empty cache: numba cannot show the assembly of what it loaded.
    done = run_python(SMALL_UPDATE + SHOW_ASSEMBLY, NUMBA_CACHE_DIR=str(tmp_path))
    kernels, counts = zip(*(line.split(maxsplit=1) for line in done.stdout.splitlines()), strict=True)
    assert kernels == ("fp32", "fp32", "split"), done.stderr
    without_copy, with_copy, split = ([int(count) for count in each.split()] for each in counts)
    assert min(without_copy[:4]) > 0
    assert without_copy[4] == 0
    assert min(with_copy) > 0
    # Of both loops: the one that streams and the one that does not.
    assert with_copy[0] >= without_copy[0]
    assert min(split[:3]) > 0
