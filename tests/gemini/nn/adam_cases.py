"""What the Adam tests share: buffers with hard values, and running one realisation on copies of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemini.nn.optimizer.kernels import reference
from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, AdamScalars
from gemini.nn.optimizer.kernels.update import adam_update

GRAD_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUT_DTYPES = [None, torch.float32, torch.bfloat16, torch.float16]


def hyper(**changes: Any) -> AdamHyper:
    values: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled": True,
        "bias_correction": True,
    }
    return AdamHyper(**{**values, **changes})


def random_bits(numel: int, generator: torch.Generator) -> Tensor:
    """float32 of any bit pattern: subnormals, infinities and NaN with the rest."""
    return torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32).view(torch.float32)


def spread(numel: int, generator: torch.Generator) -> Tensor:
    """float32 over the whole range of exponents, with zeros, subnormals and the largest values among them."""
    values = torch.randn(numel, generator=generator) * torch.pow(
        10.0, torch.empty(numel).uniform_(-44, 38, generator=generator)
    )
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1.0, 65504.0])
    at = torch.rand(numel, generator=generator) < 0.1
    chosen = special[torch.randint(len(special), (numel,), generator=generator)]
    return torch.where(at, chosen, values)


def moderate(numel: int, generator: torch.Generator) -> Tensor:
    """float32 of the size that training has."""
    return torch.randn(numel, generator=generator)


Draw = Callable[[int, torch.Generator], Tensor]


def buffers(numel: int, seed: int, draw: Draw = moderate) -> list[Tensor]:
    """param, exp_avg, exp_avg_sq, grad."""
    generator = torch.Generator().manual_seed(seed)
    param, exp_avg, exp_avg_sq, grad = (draw(numel, generator) for _ in range(4))
    return [param, exp_avg, exp_avg_sq.abs(), grad]


Update = Callable[[Sequence[Tensor], Tensor, AdamScalars, Tensor | None], None]


adam_fp32: Update = partial(adam_update, "fp32")
adam_reference: Update = reference.BY_FORM["fp32"]


def result(
    update: Update, tensors: list[Tensor], scalars: AdamScalars, out_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What ``update`` makes of copies of ``tensors``: param, exp_avg, exp_avg_sq and, if asked for, out."""
    param, exp_avg, exp_avg_sq, grad = (t.clone() for t in tensors)
    out = None if out_dtype is None else torch.empty(param.numel(), dtype=out_dtype, device=param.device)
    update((param, exp_avg, exp_avg_sq), grad, scalars, out)
    return [param, exp_avg, exp_avg_sq] if out is None else [param, exp_avg, exp_avg_sq, out]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, zeros' signs included, except that any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = torch.int32 if a.element_size() == 4 else torch.int16
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


def marks_are_ties(low: Tensor, marked_state: Tensor) -> bool:
    """True if a state has a sign only as the mark of a tie.

    The sign of a NaN would be one, too, and ``joined`` would then take 0xFFFF, a NaN in bfloat16, one further: to 0.
    """
    return not bool((marked_state.signbit() & (low != -0x8000)).any())


def pair(numel: int, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    return nn.Parameter(values.clone()), nn.Parameter(values.clone())


def give_gradients(params: tuple[Tensor, ...], step: int) -> None:
    """The same gradient for each, with sizes over many orders of magnitude."""
    generator = torch.Generator().manual_seed(1000 + step)
    grad = torch.randn(params[0].shape, generator=generator)
    grad *= 10 ** (2 * torch.randn(params[0].shape, generator=generator))
    for param in params:
        # In float16 the largest would be infinite.
        param.grad = grad.clamp(-6e4, 6e4).to(param.dtype).clone()
