"""The definition of one Adam step, up to the float32 scalars that it needs. Pure: no torch, no device.

[Note: Adam arithmetic]
All quantities are float32, ``fma`` rounds once, every other operation rounds on its own, in this order::

    g  = f32(grad) * grad_scale                              grad_scale 1.0 changes nothing
    p  = p * decay                     decoupled decay       decay = f32(1 - lr*wd)
    g  = fma(p, l2, g)                 L2 decay instead      l2 = f32(wd); skipped when wd is 0
    m  = fma(lerp, g - m, m)           lerp = f32(1-b1)      when lerp < 0.5
       = fma(lerp, g - m, g)           lerp = f32(1-b1) - 1  otherwise (``lerp_from_grad``)
    v  = fma(grad_sq*g, g, beta2*v)    grad_sq = f32(1-b2)
    p += (step_size*m) / (sqrt(v)/bias2_sqrt + eps)          step_size = f32(-lr/bc1), bias2_sqrt = f32(sqrt(bc2))

with ``bc1 = 1 - b1**t`` and ``bc2 = 1 - b2**t`` in float64 (both 1 without bias correction), and ``sqrt`` and ``/``
correctly rounded. This is the order of the vector loop of torch's fused CPU kernel, contractions by its compiler
included, so results are bit-equal to ``torch.optim.AdamW(fused=True)`` except in the last ``numel % 16`` elements of a
range that one torch thread works on, where torch's scalar tail contracts otherwise.

The two forms of the lerp are torch's: each is the more exact one on its side of 0.5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamHyper:
    """Hyperparameters of Adam, validated.

    Raises
    ------
    ValueError
        If a value is out of its range; the message names it.
    """

    lr: float
    """Learning rate, at least 0."""
    beta1: float
    """Decay of the first moment, in [0, 1)."""
    beta2: float
    """Decay of the second moment, in [0, 1)."""
    eps: float
    """Added to the denominator, at least 0."""
    weight_decay: float
    """At least 0; see ``decoupled``."""
    decoupled: bool
    """True: AdamW, the parameter shrinks by ``lr * weight_decay``. False: Adam, an L2 term joins the gradient."""
    bias_correction: bool
    """Whether the moments are divided by ``1 - beta**step``."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> "AdamHyper":
        """Read the hyperparameters of one of ``HybridAdam``'s parameter groups.

        Parameters
        ----------
        group
            Has ``lr, betas, eps, weight_decay, bias_correction, adamw_mode``. Numbers may be one-element tensors.
        """
        betas = group["betas"]
        if len(betas) != 2:
            raise ValueError(f"betas must be a pair, got {betas}")
        return cls(
            lr=float(group["lr"]),
            beta1=float(betas[0]),
            beta2=float(betas[1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=bool(group["adamw_mode"]),
            bias_correction=bool(group["bias_correction"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamScalars:
    """The scalars of one step, each a Python float whose value is exactly a float32. See [Note: Adam arithmetic]."""

    grad_scale: float
    """Multiplies the gradient before use; 1.0 for none."""
    decay: float
    """Multiplies the parameter; 1.0 for none."""
    l2: float
    """Weight of the parameter in the gradient; 0.0 for none, and then not even ``0 * inf`` is added."""
    lerp: float
    """Weight of ``g - m`` in the new first moment."""
    lerp_from_grad: bool
    """Whether that product is added to the gradient rather than to the old first moment."""
    beta2: float
    """Weight of the old second moment."""
    grad_sq: float
    """Weight of the squared gradient."""
    step_size: float
    """``-lr / bc1``, negative."""
    bias2_sqrt: float
    """``sqrt(bc2)``; 1.0 without bias correction."""
    eps: float
    """Added to the denominator."""
    noise: int
    """What the random bits for rounding states are made from (a signed 32-bit integer). See [Note: Reduced states]."""


def f32(value: float) -> float:
    """Round to the nearest float32; too large becomes infinite."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def scalars(hyper: AdamHyper, step: int, grad_scale: float = 1.0) -> AdamScalars:
    """Compute the float32 scalars of one step.

    Parameters
    ----------
    hyper
        The hyperparameters in force at this step.
    step
        Number of this step, counted from 1.
    grad_scale
        Multiplied into the gradient in float32 before anything else: the clip coefficient divided by the loss scale.

    Raises
    ------
    ValueError
        If ``step`` is below 1.
    """
    if step < 1:
        raise ValueError(f"steps are counted from 1, got {step}")
    # Powers in float64 by the C library's pow, as torch does; numpy's vector pow may differ in the last bit.
    bias1 = 1.0 - math.pow(hyper.beta1, step) if hyper.bias_correction else 1.0
    bias2 = 1.0 - math.pow(hyper.beta2, step) if hyper.bias_correction else 1.0
    lerp = f32(1.0 - hyper.beta1)
    lerp_from_grad = not lerp < 0.5
    decays = hyper.weight_decay != 0.0
    return AdamScalars(
        grad_scale=f32(grad_scale),
        decay=f32(1.0 - hyper.lr * hyper.weight_decay) if decays and hyper.decoupled else 1.0,
        l2=f32(hyper.weight_decay) if decays and not hyper.decoupled else 0.0,
        lerp=lerp - 1.0 if lerp_from_grad else lerp,  # exact: lerp is in [0.5, 1] there
        lerp_from_grad=lerp_from_grad,
        beta2=f32(hyper.beta2),
        grad_sq=f32(1.0 - hyper.beta2),
        step_size=f32(-(hyper.lr / bias1)),
        bias2_sqrt=f32(math.sqrt(bias2)),
        eps=f32(hyper.eps),
        noise=noise(step),
    )


def noise(step: int) -> int:
    """Another 32 bits for every step."""
    bits = step * 0x85EBCA77 & 0xFFFFFFFF
    return bits - (1 << 32) if bits >> 31 else bits
