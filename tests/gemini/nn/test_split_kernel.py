"""One step of masters in two halves: the bits of a step of the masters, by both realisations."""

import re

import pytest
import torch
from adam_cases import (
    GRAD_DTYPES,
    Update,
    adam_reference,
    buffers,
    hyper,
    marks_are_ties,
    moderate,
    random_bits,
    result,
    same_bits,
    spread,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemini.chunk import halves, joined, marked, unmarked
from gemini.nn.optimizer.kernels.arithmetic import AdamScalars, scalars
from gemini.nn.optimizer.kernels.kernel_pool import KernelPool
from gemini.nn.optimizer.kernels.update import adam_update

pytest.importorskip("numba")

from gemini.nn.optimizer.kernels import cpu_update, reference

HYPERS = [
    hyper(),
    hyper(weight_decay=0.1, lr=3e-2, beta1=0.95, beta2=0.98, eps=1e-6),
    hyper(weight_decay=0.1, decoupled=False),
    hyper(beta1=0.3, beta2=0.5, weight_decay=0.01),
    hyper(lr=0.0),
]
DRAWS = {"moderate": moderate, "spread": spread, "any bits": random_bits}
UPDATES: list[Update] = [cpu_update.BY_FORM["split"], reference.BY_FORM["split"]]


def ties(numel: int, generator: torch.Generator) -> Tensor:
    """Masters half way between two bfloat16."""
    bits = random_bits(numel, generator).view(torch.int32)
    return (bits & ~0xFFFF | 0x8000).view(torch.float32)


def split(tensors: list[Tensor]) -> list[Tensor]:
    param, exp_avg, exp_avg_sq, grad = tensors
    high, low, mark = halves(param)
    return [high, low, exp_avg.clone(), marked(exp_avg_sq, mark), grad]


def whole(tensors: list[Tensor]) -> list[Tensor]:
    """param, exp_avg, exp_avg_sq, copy."""
    high, low, exp_avg, exp_avg_sq, _ = tensors
    return [joined(high, low, exp_avg_sq), exp_avg, unmarked(exp_avg_sq), high]


def check(update: Update, tensors: list[Tensor], s: AdamScalars) -> None:
    expected = result(adam_reference, tensors, s, torch.bfloat16)
    ours = split(tensors)
    update(ours[:-1], ours[-1], s)
    assert marks_are_ties(ours[1], ours[3])
    for name, a, b in zip(("param", "exp_avg", "exp_avg_sq", "copy"), whole(ours), expected, strict=True):
        assert same_bits(a, b), name


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    hyper_index=st.integers(0, len(HYPERS) - 1),
    draw=st.sampled_from(sorted(DRAWS)),
    step=st.integers(1, 10_000),
    grad_scale=st.sampled_from([1.0, 0.3, 2.0**-16, float("inf")]),
    update=st.sampled_from(UPDATES),
)
def test_a_step_has_the_bits_of_a_step_of_whole_masters(
    numel: int,
    seed: int,
    grad_dtype: torch.dtype,
    hyper_index: int,
    draw: str,
    step: int,
    grad_scale: float,
    update: Update,
) -> None:
    tensors = buffers(numel, seed, DRAWS[draw])
    tensors[3] = tensors[3].to(grad_dtype)
    check(update, tensors, scalars(HYPERS[hyper_index], step, grad_scale))


@pytest.mark.parametrize("update", UPDATES)
def test_ties_are_kept(update: Update) -> None:
    """With a learning rate of 0 every master stays what it is, and a tie is a tie."""
    tensors = buffers(100_003, 0)
    tensors[0] = ties(100_003, torch.Generator().manual_seed(1))
    check(update, tensors, scalars(hyper(lr=0.0), 3))
    # From numbers next to a tie, some of which step onto one.
    tensors[0] = (tensors[0].view(torch.int32) + torch.randint(-2, 3, (100_003,)).to(torch.int32)).view(torch.float32)
    check(update, tensors, scalars(hyper(lr=1e-8), 3))


def test_many_steps_in_pieces_on_several_threads_equal_those_of_whole_masters() -> None:
    numel = (1 << 18) + 5
    plain = [t.clone() for t in buffers(numel, 3)]
    copy = torch.empty(numel, dtype=torch.bfloat16)
    halved = split(plain)
    generator = torch.Generator().manual_seed(4)
    pool = KernelPool(3)
    try:
        for step in range(1, 30):
            grad = torch.randn(numel, generator=generator).to(torch.bfloat16)
            s = scalars(hyper(weight_decay=0.1, lr=1e-2), step)
            adam_reference(plain[:3], grad, s, copy)
            for part in (slice(0, 100_000), slice(100_000, numel)):
                cpu_update.adam_cpu("split", [t[part] for t in halved[:4]], grad[part], s, pool=pool)
        for a, b in zip(whole(halved), (*plain[:3], copy), strict=True):
            assert torch.equal(a, b)
        assert bool((halved[3].signbit()).any()), "no tie came along"
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (0, torch.zeros(10), "high must be torch.bfloat16, got torch.float32"),
        (1, torch.zeros(10, dtype=torch.int32), "low must be torch.int16, got torch.int32"),
        (2, torch.zeros(10, dtype=torch.bfloat16), "exp_avg must be torch.float32, got torch.bfloat16"),
        (3, torch.zeros(9), "exp_avg_sq has 9 elements, must have 10"),
        (4, torch.zeros(2, 5), "grad must be one-dimensional and contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(at: int, wrong: Tensor, message: str) -> None:
    tensors = split(buffers(10, 0))
    before = [t.clone() for t in tensors]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        given = [*tensors[:at], wrong, *tensors[at + 1 :]]
        adam_update("split", given[:-1], given[-1], scalars(hyper(), 1))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
