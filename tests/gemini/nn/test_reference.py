"""The exact building blocks of the reference realisation."""

from fractions import Fraction

import numpy as np
import torch
from adam_cases import adam_reference, buffers, hyper, random_bits, result, same_bits

from gemini.nn.optimizer.kernels.arithmetic import scalars
from gemini.nn.optimizer.kernels.reference import fma, sqrt


def nearest_float32(exact: Fraction) -> float:
    """Round a rational to the nearest float32, ties to even, in integer arithmetic (subnormals included)."""
    if exact == 0:
        return 0.0
    sign, magnitude = (-1.0, -exact) if exact < 0 else (1.0, exact)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1, -126)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    return sign * float(round(magnitude / unit) * unit)  # round() of a Fraction goes to even


def check_fma(a: float, b: float, c: float) -> None:
    expected = nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))
    got = fma(torch.tensor([a]), torch.tensor([b]), torch.tensor([c])).item()
    assert got == expected, (a.hex(), b.hex(), c.hex(), got.hex(), expected.hex())


def test_fma_is_right_where_rounding_twice_is_wrong() -> None:
    # a*b = 2**-24 - 2**-70, so the exact sum lies just below the middle of c and the next float32. Float64 cannot tell
    # it from the middle, and a tie goes to the even neighbour: up.
    a, b, c = 2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23
    assert nearest_float32(Fraction(a) * Fraction(b) + Fraction(c)) == c
    assert float(np.float32(a * b + c)) == 1 + 2.0**-22
    for sign in (1.0, -1.0):
        check_fma(sign * a, b, sign * c)
        check_fma(sign * a, b, -sign * c)
        # Likewise just above the middle of 1 and the next, where a tie would go down.
        check_fma(sign * a, a, sign * 1.0)
        check_fma(2.0**-30, sign * 2.0**-30, c)


def test_fma_is_exact_for_random_bit_patterns() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (random_bits(4000, generator) for _ in range(3))
    # Make the terms comparable in half of the cases, or the sum is decided by one of them.
    c[::2] = (a[::2].double() * b[::2].double() * (1 + torch.randn(2000, generator=generator).double())).float()
    got = fma(a, b, c)
    finite = a.isfinite() & b.isfinite() & c.isfinite() & got.isfinite()
    assert finite.sum() > 1000
    for x, y, z, r in zip(
        a[finite].tolist(), b[finite].tolist(), c[finite].tolist(), got[finite].tolist(), strict=True
    ):
        assert r == nearest_float32(Fraction(x) * Fraction(y) + Fraction(z))


def test_fma_rounds_to_subnormals_once() -> None:
    tiny = 2.0**-149
    for a, b, c in [
        (2.0**-75, 2.0**-75, tiny),  # half a unit above 1: to even, 2
        (2.0**-75, 2.0**-75, 2 * tiny),  # half a unit above 2: to even, 2
        (2.0**-75 * (1 + 2.0**-23), 2.0**-75, 2 * tiny),  # a bit more: 3
        (2.0**-100, -(2.0**-100), tiny),
        (2.0**-100, -(2.0**-100), 2.0**-126),
    ]:
        check_fma(a, b, c)


def test_fma_follows_infinities_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([inf, inf, 1.0, nan, 3e38, -3e38])
    b = torch.tensor([1.0, 1.0, 1.0, 1.0, 3e38, 3e38])
    c = torch.tensor([1.0, -inf, -inf, 1.0, 0.0, 1.0])
    assert same_bits(fma(a, b, c), torch.tensor([inf, nan, -inf, nan, inf, -inf]))


def test_sqrt_equals_the_correctly_rounded_one() -> None:
    generator = torch.Generator().manual_seed(1)
    values = random_bits(1 << 20, generator).abs()
    with np.errstate(invalid="ignore"):  # NaN among the values
        expected = torch.from_numpy(np.sqrt(values.numpy()))  # the processor's instruction
    assert same_bits(sqrt(values), expected)


def test_a_gradient_scale_of_one_changes_nothing_and_others_multiply_first() -> None:
    tensors = buffers(1000, seed=2)
    scaled = result(adam_reference, tensors, scalars(hyper(), 3, grad_scale=0.3))
    multiplied = result(adam_reference, [*tensors[:3], tensors[3] * 0.3], scalars(hyper(), 3, grad_scale=1.0))
    assert all(torch.equal(a, b) for a, b in zip(scaled, multiplied, strict=True))
