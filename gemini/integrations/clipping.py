"""Clipping the gradients of a boosted model where a framework would do it through ``p.grad``."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from gemini.nn.optimizer.managed import ManagedOptimizer
from gemini.updates.absent_gradient import AbsentGradient


def clip_by_norm(
    optimizer: ManagedOptimizer, parameters: Sequence[Tensor], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """Clip all gradients of a boosted optimizer together; return their norm before that.

    Where all of them are fp32 and shown they are scaled there and then, so that hooks and loggers see clipped ones, as
    they do without management. Else the next step scales them: what is rounded in between would depend on placement.

    Parameters
    ----------
    parameters
        Those of the optimizer, in the order in which the framework goes through them.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not all(g.dtype is torch.float32 and not isinstance(g, AbsentGradient) for g in gradients):
        return optimizer.clip_grad_by_norm(max_norm, norm_type, parameters=parameters)
    norm = optimizer.clip_grad_by_norm(math.inf, norm_type, parameters=parameters)
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def has_all(optimizer: ManagedOptimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether these are all parameters of an optimizer, as far as they have gradients."""
    asked = {id(p) for p in parameters if p.grad is not None}
    return asked == {id(p) for p in _parameters(optimizer) if p.grad is not None}


def _parameters(optimizer: ManagedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
