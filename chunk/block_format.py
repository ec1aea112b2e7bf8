"""Numbers in four or eight bits with a scale for each block of them: the formats, and their arithmetic in plain torch.

[Note: Block formats]
A run of numbers is cut into blocks of 64, from the first one on; the last block may be shorter. Of each block is kept
its largest magnitude (``absmax``, float32), and of each number which of the format's ``levels`` is nearest to it when
the block is scaled to [-1, 1]::

    absmax = max |x|                                  all in float32
    scaled = x * (1 / max(absmax, 1e-38))             in a last block that is shorter: x / max(absmax, 1e-38)
    code   = number of midpoints between neighbouring levels that are below ``scaled``
    value  = levels[code] * absmax                    rounded once more, to the dtype that is asked for

    nf4    16 levels, the quantiles of a normal distribution     4 bits + 32/64 = 0.5625 bytes a number
    int8   255 levels, -127/127 to 127/127                       8 bits + 32/64 = 1.0625 bytes a number

The levels of NF4 are those of Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E. Two
codes share a byte, the first one in its upper half. Codes and ``absmax`` are those of bitsandbytes 0.50 on the CPU, bit
by bit (hence the division in a shorter block), and so are the values; of its 8-bit quantiser with these levels one code
in a thousand is another one, because it rounds what is close to a midpoint by a table. There 8 bits have other levels
by default, which are denser around 0: of normally distributed weights their error is 1.8 times as large.

A block with NaN has a NaN ``absmax``, and so only NaN; one with an infinite number has an infinite ``absmax``.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK_NUMEL = 64
"""Elements that share an ``absmax``."""
_SMALLEST_ABSMAX = 1e-38
"""Its inverse is finite."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A format. See [Note: Block formats]."""

    name: str
    levels: tuple[float, ...]
    """Rising, from -1 to 1; they count as float32."""
    codes_per_byte: int

    @property
    def code_of_zero(self) -> int:
        return self.levels.index(0.0)


NF4 = BlockFormat(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    codes_per_byte=2,
)  # fmt: skip
INT8 = BlockFormat("int8", tuple(q / 127 for q in range(-127, 128)), codes_per_byte=1)
FORMATS = {form.name: form for form in (NF4, INT8)}
"""By their names."""


@cache
def levels_of(form: BlockFormat) -> Tensor:
    """The levels (float32)."""
    return torch.tensor(form.levels, dtype=torch.float32, device="cpu")


@cache
def midpoints_of(form: BlockFormat) -> Tensor:
    """Between neighbouring levels (float32): codes are what is above them."""
    levels = levels_of(form)
    return (levels[:-1] + levels[1:]) / 2


def quantise(values: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes and ``absmax`` of a run of numbers.

    Parameters
    ----------
    values
        Flat, on CPU, of any floating-point dtype.

    Returns
    -------
    tuple of Tensor
        uint8, of ``numel / codes_per_byte`` bytes, and float32, of ``numel / 64`` numbers, both rounded up.
    """
    numel = values.numel()
    blocks = torch.nn.functional.pad(values.float(), (0, -numel % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)
    absmax = blocks.abs().amax(1)
    divisors = absmax.clamp(min=_SMALLEST_ABSMAX)
    scaled = blocks * (1.0 / divisors)[:, None]
    if numel % BLOCK_NUMEL:
        torch.div(blocks[-1], divisors[-1], out=scaled[-1])
    codes = (
        torch.bucketize(scaled.clamp_(-1.0, 1.0), midpoints_of(form), out_int32=True).view(-1)[:numel].to(torch.uint8)
    )
    if form.codes_per_byte == 1:
        return codes, absmax
    pairs = torch.nn.functional.pad(codes, (0, numel % 2), value=form.code_of_zero).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], absmax


def dequantise(codes: Tensor, absmax: Tensor, form: BlockFormat, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for, flat; one more than there were where the last byte has a code too many."""
    if form.codes_per_byte == 2:
        codes = torch.stack((codes >> 4, codes & 0xF), dim=1).view(-1)
    numel = codes.numel()
    levels = torch.nn.functional.pad(levels_of(form).to(codes.device)[codes.int()], (0, -numel % BLOCK_NUMEL))
    return (levels.view(-1, BLOCK_NUMEL) * absmax[:, None]).view(-1)[:numel].to(dtype)
