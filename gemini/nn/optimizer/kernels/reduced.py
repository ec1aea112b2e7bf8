"""Optimizer states in fewer bits than float32: the formats, and how numbers are rounded to them. Plain torch.

[Note: Reduced states]
Both moments are kept either in bfloat16, or in 8 bits an element with one scale per `BLOCK_NUMEL` of them. A step
widens them to float32 (exactly), computes as in [Note: Adam arithmetic], uses the new float32 moments for the
parameter, and rounds them to be kept.

**Rounding is stochastic**: up with the probability that makes the expected value exact. The second moment changes by a
thousandth of itself a step (``1 - beta2``), which is less than half of the distance of neighbouring bfloat16 (or 8-bit)
numbers: rounded to nearest it would never shrink again, and grow only from gradients several times as large as it says.

**The random bits** are a hash of the new moments' own bits and of the number of the step. So they need no state and no
position: any cut of a buffer (at whole blocks), any number of threads, any placement gives the same bits, and so does
repeating the step::

    h   = bits(m) * 0x9E3779B1 ^ bits(v) ^ noise               noise = step * 0x85EBCA77, all modulo 2**32;
    h  ^= h >> 16;  h *= 0x85EBCA6B                            any NaN counts as 0x7FC00000
    h  ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16             (the finaliser of MurmurHash3, A. Appleby)
    low 16 bits: for m.  high 16 bits: for v.

**bfloat16**: ``bits + random`` with the low 16 bits cut off.

**8 bits**: a block is ``scale * number``, the numbers being small floating-point ones::

    exp_avg      s eeee mmm      sign, exponent, mantissa       +-1.875 down to 2**-17, and 0
    sqrt(v)        eeee mmmm     its square is the moment         1.9375 down to 2**-18, and 0

``scale`` is the largest power of two that leaves the block's largest magnitude within reach. (Block-wise scales are
from Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022. There the scale is the largest magnitude
itself and the numbers come from a table. With a power of two, what does not change is exactly what it was before, and
packing what was unpacked gives the same numbers, so checkpoints need no scales. With floating-point numbers, packing
needs no search.) The second moment is kept as its root, which has half of the range to cover. A root that is not 0 is
not rounded to 0: the step would divide by ``eps`` alone. A block with an infinite or NaN moment becomes NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_NUMEL = 256
"""Elements that share a scale. Scales add 0.03 bytes a parameter."""

_MASK = 0xFFFFFFFF
_NAN_BITS = 0x7FC00000


class Format(NamedTuple):
    """A small floating-point format: unsigned, with exponents from 2**-14 (with subnormal numbers below) to 2**0."""

    mantissa: int
    """Bits of the mantissa; four of the exponent stand before them."""

    @property
    def shift(self) -> int:
        """Bits of a float32 that it has no room for."""
        return 23 - self.mantissa

    @property
    def largest(self) -> int:
        """The largest code."""
        return (16 << self.mantissa) - 1


EXP_AVG = Format(3)
ROOT = Format(4)
_SMALLEST_NORMAL = 2.0**-14


def random_bits(exp_avg: Tensor, exp_avg_sq: Tensor, noise: int) -> tuple[Tensor, Tensor]:
    """Sixteen random bits for the rounding of each of the two (as int64)."""
    h = ((_bits(exp_avg) * 0x9E3779B1) & _MASK) ^ _bits(exp_avg_sq) ^ (noise & _MASK)
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    h = h ^ (h >> 16)
    return h & 0xFFFF, h >> 16


def _bits(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), _NAN_BITS, x.view(torch.int32).long() & _MASK)


def blocks(flat: Tensor) -> Tensor:
    """A float32 tensor as rows of `BLOCK_NUMEL`; the last one is filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)


def to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 stochastically; NaN stays NaN."""
    up = (((x.view(torch.int32).long() & _MASK) + random) & 0xFFFF0000).to(torch.int64)
    rounded = _from_bits(up).bfloat16()
    return torch.where(x.isnan(), x.bfloat16(), rounded)


def _from_bits(bits: Tensor) -> Tensor:
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def scale_of(magnitude: Tensor, form: Format) -> Tensor:
    """The scale of a block with this largest magnitude; NaN if that is not finite, the smallest normal one for 0."""
    bits = magnitude.view(torch.int32)
    exponent = ((bits + ((1 << form.shift) - 1)) >> 23).clamp(1, 253)  # the inverse is a normal number, too
    scale = (exponent << 23).view(torch.float32)
    return torch.where(magnitude < torch.inf, scale, torch.nan)


def encode(magnitude: Tensor, scale: Tensor, random: Tensor, form: Format) -> Tensor:
    """Codes (int32) of float32 magnitudes, rounded by sixteen random bits (0x8000 for all: to nearest)."""
    y = magnitude * (1.0 / scale)  # powers of two: exact
    is_small = y < _SMALLEST_NORMAL
    # What is added makes the last bits of subnormal numbers those of their sum.
    z = torch.where(is_small, y + _SMALLEST_NORMAL, y)
    first = (113 << form.mantissa) - torch.where(is_small, 0, 1 << form.mantissa).int()
    code = ((z.view(torch.int32) + (random.int() << (form.shift - 16))) >> form.shift) - first
    return torch.where(y.isnan(), 0, code.clamp(max=form.largest))


def decode(code: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Float32 magnitudes of int32 codes."""
    is_small = code < 1 << form.mantissa
    first = (113 << form.mantissa) - torch.where(is_small, 0, 1 << form.mantissa).int()
    z = ((code + first) << form.shift).view(torch.float32)
    return torch.where(is_small, z - _SMALLEST_NORMAL, z) * scale


def pack_exp_avg(flat: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and scales of a first moment (float32, flat).

    Parameters
    ----------
    random
        Sixteen bits an element; None rounds to nearest.
    """
    codes, scales = _pack(flat.abs(), random, EXP_AVG)
    sign = torch.signbit(flat).int() << 7
    return torch.where(_of_elements(scales, flat.numel()).isnan(), 0, codes | sign).to(torch.uint8), scales


def pack_exp_avg_sq(flat: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and scales of a second moment (float32, flat); as `pack_exp_avg`."""
    root = sqrt(flat)
    codes, scales = _pack(root, random, ROOT)
    lost = (codes == 0) & (root > 0) & ~_of_elements(scales, flat.numel()).isnan()
    return torch.where(lost, 1, codes).to(torch.uint8), scales


def unpack_exp_avg(codes: Tensor, scales: Tensor) -> Tensor:
    """The first moment that `pack_exp_avg` made."""
    magnitude = decode(codes.int() & 0x7F, _of_elements(scales, codes.numel()), EXP_AVG)
    return torch.where(codes >= 0x80, -magnitude, magnitude)


def unpack_exp_avg_sq(codes: Tensor, scales: Tensor) -> Tensor:
    """The second moment that `pack_exp_avg_sq` made."""
    root = decode(codes.int(), _of_elements(scales, codes.numel()), ROOT)
    return root * root


def _pack(magnitude: Tensor, random: Tensor | None, form: Format) -> tuple[Tensor, Tensor]:
    # NaN is larger than all others by its bits, as in the kernels; torch's maximum is NaN as well.
    scales = scale_of(blocks(magnitude).amax(dim=1), form)
    random = torch.full(magnitude.shape, 0x8000, device=magnitude.device) if random is None else random
    return encode(magnitude, _of_elements(scales, magnitude.numel()), random, form), scales


def _of_elements(scales: Tensor, numel: int) -> Tensor:
    return scales.repeat_interleave(BLOCK_NUMEL)[:numel]


def sqrt(x: Tensor) -> Tensor:
    """Compute the correctly rounded float32 square root.

    ``torch.sqrt`` on a float32 CPU tensor calls MKL, which is 1 ulp off for some values. In float64 an ulp does not
    matter: the root of a float32 is never within 2**-50 (relative) of a float32 rounding boundary.
    """
    return x.double().sqrt().float()
