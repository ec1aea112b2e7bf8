"""Moments in bfloat16 and in 8 bits: the formats, and kernels that are bit-equal to the reference."""

import itertools
from functools import partial

import pytest
import torch
from adam_cases import GRAD_DTYPES, OUT_DTYPES, Update, buffers, hyper, moderate, random_bits, same_bits, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemini.nn.optimizer.kernels import cpu_update, kernel_pool, reference
from gemini.nn.optimizer.kernels.arithmetic import AdamScalars, scalars
from gemini.nn.optimizer.kernels.kernel_pool import KernelPool
from gemini.nn.optimizer.kernels.reduced import (
    BLOCK_NUMEL,
    EXP_AVG,
    ROOT,
    Format,
    decode,
    encode,
    pack_exp_avg,
    pack_exp_avg_sq,
    scale_of,
    to_bfloat16,
    unpack_exp_avg,
    unpack_exp_avg_sq,
)
from gemini.nn.optimizer.kernels.reduced import random_bits as rounding_bits
from gemini.nn.optimizer.kernels.update import adam_update
from gemini.nn.optimizer.rules.moments import packed, slots, unpacked

HYPERS = [
    hyper(),
    hyper(weight_decay=0.1, lr=3e-2, beta1=0.95, beta2=0.98, eps=1e-6),
    hyper(weight_decay=0.1, decoupled=False),
    hyper(beta1=0.3, beta2=0.5, weight_decay=0.01),
]
DRAWS = {"moderate": moderate, "spread": spread, "any bits": random_bits}
REDUCED = ["bf16", "8bit"]


def kept_buffers(tensors: list[Tensor], states: str) -> list[Tensor]:
    """The moments among ``tensors``, as they are kept."""
    kept = packed(states, {"exp_avg": tensors[1], "exp_avg_sq": tensors[2]})
    return [kept[slot.name] for slot in slots(states)]


def stepped(
    update: Update, param: Tensor, kept: list[Tensor], grad: Tensor, s: AdamScalars, out_dtype: torch.dtype | None
) -> list[Tensor]:
    """What ``update`` makes of copies."""
    param, kept = param.clone(), [tensor.clone() for tensor in kept]
    out = None if out_dtype is None else torch.empty(param.numel(), dtype=out_dtype)
    update((param, *kept), grad, s, out)
    return [param, *kept] if out is None else [param, *kept, out]


def check_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y) if x.dtype is torch.uint8 else same_bits(x, y), i


UPDATES: dict[str, Update] = {states: partial(adam_update, states) for states in REDUCED}


@settings(max_examples=60, deadline=None)
@given(
    states=st.sampled_from(REDUCED),
    numel=st.integers(1, 1500),
    seed=st.integers(0, 2**31),
    grad_dtype=st.sampled_from(GRAD_DTYPES),
    out_dtype=st.sampled_from([None, torch.bfloat16]),
    hyper_index=st.integers(0, len(HYPERS) - 1),
    draw=st.sampled_from(sorted(DRAWS)),
    step=st.integers(1, 10_000),
    grad_scale=st.sampled_from([1.0, 0.3, 1e-30, float("inf")]),
)
def test_the_kernels_equal_the_reference_for_any_length_dtype_and_value(
    states: str,
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
    kept, grad = kept_buffers(tensors, states), tensors[3].to(grad_dtype)
    s = scalars(HYPERS[hyper_index], step, grad_scale)
    kernel, plain = cpu_update.BY_FORM[states], reference.BY_FORM[states]
    check_equal(
        stepped(kernel, tensors[0], kept, grad, s, out_dtype), stepped(plain, tensors[0], kept, grad, s, out_dtype)
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("states", REDUCED)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_a_long_buffer_has_the_same_bits_with_any_threads_streamed_or_not(
    states: str, out_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = buffers((1 << 17) + 77, seed=3, draw=spread)
    kept, grad = kept_buffers(tensors, states), tensors[3].bfloat16()
    s = scalars(HYPERS[1], 5)
    kernel = cpu_update.BY_FORM[states]
    expected = stepped(reference.BY_FORM[states], tensors[0], kept, grad, s, out_dtype)
    monkeypatch.setattr(kernel_pool, "_SMALLEST_SLICE_NUMEL", 1 << 12)
    for threads, limit in itertools.product((1, 3), (1, 1 << 30)):
        monkeypatch.setattr(cpu_update, "STREAMING_PAYS", True)
        monkeypatch.setattr(cpu_update, "STREAM_NUMEL", limit)
        pool = KernelPool(threads)

        def with_pool(*args: object, pool: KernelPool = pool) -> None:
            kernel(*args, pool=pool)  # type: ignore[operator]

        check_equal(stepped(with_pool, tensors[0], kept, grad, s, out_dtype), expected)
        pool.close()


@pytest.mark.parametrize("states", REDUCED)
def test_updating_in_pieces_of_whole_blocks_gives_the_same_bits(states: str) -> None:
    tensors = buffers(10 * BLOCK_NUMEL + 13, seed=4)
    kept, s = kept_buffers(tensors, states), scalars(HYPERS[0], 2)
    update = UPDATES[states]
    whole = stepped(update, tensors[0], kept, tensors[3], s, None)
    param, pieces = tensors[0].clone(), [tensor.clone() for tensor in kept]
    for start, stop in itertools.pairwise((0, 1, 4, 9, 11)):
        at = slice(start * BLOCK_NUMEL, stop * BLOCK_NUMEL)
        of_slots = [
            tensor[slice(start, stop)] if slot.block_numel > 1 else tensor[at]
            for slot, tensor in zip(slots(states), pieces, strict=True)
        ]
        update((param[at], *of_slots), tensors[3][at], s, None)
    check_equal([param, *pieces], whole)


def test_zeros_behind_a_parameter_change_nothing() -> None:
    tensors = buffers(300, seed=5)
    kept, s = kept_buffers(tensors, "8bit"), scalars(HYPERS[0], 2)
    expected = stepped(UPDATES["8bit"], tensors[0], kept, tensors[3], s, None)
    longer = [torch.nn.functional.pad(tensor, (0, 212)) for tensor in (tensors[0], *kept[:2], tensors[3])]
    got = stepped(UPDATES["8bit"], longer[0], [*longer[1:3], *kept[2:]], longer[3], s, None)
    check_equal([t[:300] for t in got[:3]] + got[3:], expected)
    assert all((tensor[300:] == 0).all() for tensor in got[:3])


# -- the formats


@pytest.mark.parametrize("form", [EXP_AVG, ROOT])
def test_every_code_is_a_number_of_its_own_and_comes_back(form: Format) -> None:
    codes, scale = torch.arange(form.largest + 1, dtype=torch.int32), torch.tensor(0.25)
    numbers = decode(codes, scale, form)
    assert (numbers[1:] > numbers[:-1]).all()
    assert torch.equal(encode(numbers, scale, torch.full_like(codes, 0x8000), form), codes)
    # What is on the grid is not moved by any random bits.
    for random in (0, 0x7FFF, 0xFFFF):
        assert torch.equal(encode(numbers, scale, torch.full_like(codes, random), form), codes)
    assert scale_of(numbers[-1], form) == scale


@pytest.mark.parametrize("draw", ["moderate", "spread"])
def test_what_was_unpacked_packs_to_the_same_numbers(draw: str) -> None:
    for seed, numel in itertools.product(range(5), (1, 255, 256, 257, 5000)):
        _, exp_avg, exp_avg_sq, _ = buffers(numel, seed, DRAWS[draw])
        exp_avg_sq.clamp_(max=1e38)  # rounding up may reach infinity above
        random = rounding_bits(exp_avg, exp_avg_sq, seed)
        for pack, unpack, moment, bits in (
            (pack_exp_avg, unpack_exp_avg, exp_avg, random[0]),
            (pack_exp_avg_sq, unpack_exp_avg_sq, exp_avg_sq, random[1]),
        ):
            once = unpack(*pack(moment, bits))
            assert same_bits(unpack(*pack(once)), once)


def test_errors_are_within_a_step_of_the_format() -> None:
    _, exp_avg, exp_avg_sq, _ = buffers(1 << 16, seed=1)
    for pack, unpack, moment, bound in (
        (pack_exp_avg, unpack_exp_avg, exp_avg, 2**-4),
        (pack_exp_avg_sq, unpack_exp_avg_sq, exp_avg_sq, 2**-4 + 2**-10),
    ):
        error = (unpack(*pack(moment)) - moment).abs() / moment.abs()
        large = moment.abs() > moment.abs().max() * 2**-10
        assert error[large].max() <= bound
    assert (unpack_exp_avg_sq(*pack_exp_avg_sq(exp_avg_sq)) > 0).all()


@pytest.mark.parametrize("states", REDUCED)
def test_rounding_is_right_on_average_where_rounding_to_nearest_stalls(states: str) -> None:
    # With next to no gradients exp_avg_sq shrinks by a thousandth a step: 1000 steps leave 0.3677 of it. Rounded to
    # nearest it would stay where it is.
    value = torch.linspace(0.5, 1.0, 1 << 14)
    names = [slot.name for slot in slots(states)]
    kept = kept_buffers([value, torch.zeros_like(value), value], states)
    nearest = unpacked(states, dict(zip(names, kept, strict=True)))["exp_avg_sq"]
    after = packed(states, {"exp_avg": nearest, "exp_avg_sq": nearest * 0.999})
    assert (unpacked(states, after)["exp_avg_sq"] == nearest).float().mean() > 0.7
    update = UPDATES[states]
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 1001):
        # Some gradient: elements that are equal in all, like most of these, would be rounded alike.
        grad = 1e-12 * torch.randn(value.shape, generator=generator)
        update((torch.ones_like(value), *kept), grad, scalars(hyper(), step), None)
    left = unpacked(states, dict(zip(names, kept, strict=True)))["exp_avg_sq"]
    ratio = float(left.sum() / nearest.sum()) / 0.999**1000
    # The root of 8 bits is right on average, its square 1 + variance times as large: 2 % after 1000 steps.
    assert abs(ratio - 1) < (0.005 if states == "bf16" else 0.04), ratio


def test_random_bits_are_even_and_change_with_the_step() -> None:
    _, exp_avg, exp_avg_sq, _ = buffers(1 << 16, seed=2)
    first, second = rounding_bits(exp_avg, exp_avg_sq, 1), rounding_bits(exp_avg, exp_avg_sq, 2)
    for bits in (*first, *second):
        counts = torch.bincount(bits >> 8, minlength=256).float()
        chi_squared = float(((counts - 256) ** 2 / 256).sum())
        assert 150 < chi_squared < 380, chi_squared  # 255 expected, with a deviation of 22.6
    for a, b in itertools.combinations((*first, *second), 2):
        correlation = torch.corrcoef(torch.stack([a.float(), b.float()]))[0, 1]
        assert abs(float(correlation)) < 0.03


def test_rounding_to_bfloat16_picks_a_neighbour_and_keeps_what_is_one() -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 14,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = bits.view(torch.float32)
    down, up = to_bfloat16(x, torch.zeros_like(bits)), to_bfloat16(x, torch.full_like(bits, 0xFFFF))
    finite = x.isfinite()
    nearest = x.bfloat16()[finite]
    assert ((nearest == down[finite]) | (nearest == up[finite])).all()
    exact = down.float()
    assert same_bits(to_bfloat16(exact, torch.full_like(bits, 0xFFFF)), down)
    assert torch.equal(x.isnan(), down.isnan())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_infinite_gradient_spoils_its_block_of_8_bit_states_and_no_other(bad: float) -> None:
    tensors = buffers(3 * BLOCK_NUMEL, seed=6)
    kept = kept_buffers(tensors, "8bit")
    tensors[3][BLOCK_NUMEL + 5] = bad
    got = stepped(UPDATES["8bit"], tensors[0], kept, tensors[3], scalars(hyper(), 1), None)
    moment = unpack_exp_avg(got[1], got[3]).view(3, BLOCK_NUMEL)
    assert moment[1].isnan().all()
    assert moment[[0, 2]].isfinite().all()
    assert int(got[0].isfinite().sum()) == 3 * BLOCK_NUMEL - 1


def test_tensors_that_do_not_fit_are_refused() -> None:
    tensors = buffers(300, seed=7)
    kept, s = kept_buffers(tensors, "8bit"), scalars(hyper(), 1)
    with pytest.raises(ValueError, match="exp_avg_scale has 1 elements, must have 2"):
        adam_update("8bit", (tensors[0], kept[0], kept[1], kept[2][:1], kept[3]), tensors[3], s)
    with pytest.raises(TypeError, match=r"exp_avg_sq must be torch.uint8, got torch.float32"):
        adam_update("8bit", (tensors[0], kept[0], tensors[2], kept[2], kept[3]), tensors[3], s)
    with pytest.raises(TypeError, match=r"exp_avg_sq must be torch.bfloat16, got torch.float32"):
        adam_update("bf16", (tensors[0], tensors[1].bfloat16(), tensors[2]), tensors[3], s)
