"""accelerate's `Accelerator`, for a model whose parameters are where chunks are."""

import math
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from gemini.boosted import boosted, is_boosted
from gemini.nn.optimizer.managed import ManagedOptimizer


class ManagedAccelerator(Accelerator):
    """Moves data to the device, and leaves a boosted model and its optimizer where they are. Clips their gradients."""

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, **options: Any) -> nn.Module:
        placement = False if is_boosted(model) else device_placement
        return super().prepare_model(model, device_placement=placement, **options)  # type: ignore[no-any-return]

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Optimizer:
        placement = False if _is_managed(optimizer) else device_placement
        return super().prepare_optimizer(optimizer, device_placement=placement)  # type: ignore[no-any-return]

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor | float | None:
        """Clip, and return the norm before that; None where gradients are used up one by one and have no norm."""
        parameters = list(parameters)
        model = self._trained(parameters)
        if model is None:
            return super().clip_grad_norm_(parameters, max_norm, norm_type)  # type: ignore[no-any-return]
        config, optimizer = boosted(model).config, _optimizer(model)
        if config.update_in_backward and math.isinf(max_norm):
            return None
        # A plugin with a norm of its own clips within the step.
        return optimizer.clip_grad_by_norm(math.inf if config.max_norm > 0 else max_norm, norm_type)

    def clip_grad_value_(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        parameters = list(parameters)
        model = self._trained(parameters)
        if model is None:
            super().clip_grad_value_(parameters, clip_value)
        else:
            _optimizer(model).clip_grad_by_value(clip_value)

    def _trained(self, parameters: Iterable[Tensor]) -> nn.Module | None:
        """The boosted model whose optimizer has these parameters with a gradient, and no others; else None.

        Those of one part of a model are clipped through ``p.grad``, which says so where it cannot be.
        """
        asked = {id(p) for p in parameters if p.grad is not None}
        for model in self._models:
            if is_boosted(model) and (reference := boosted(model).optimizer) is not None:
                optimizer = reference()
                if optimizer is not None and asked == {
                    id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
                }:
                    return model  # type: ignore[no-any-return]
        return None


def managed(accelerator: Accelerator) -> Accelerator:
    """Make an accelerator that somebody else has constructed a `ManagedAccelerator`, in place."""
    cls = type(accelerator)
    if not issubclass(cls, ManagedAccelerator):
        accelerator.__class__ = type(cls.__name__, (ManagedAccelerator, cls), {"__module__": cls.__module__})
    return accelerator


def unwrapped(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer within accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _optimizer(model: nn.Module) -> ManagedOptimizer:
    reference = boosted(model).optimizer
    optimizer = reference() if reference is not None else None
    assert optimizer is not None
    return optimizer


def _is_managed(optimizer: Optimizer) -> bool:
    inner = unwrapped(optimizer)
    return isinstance(inner, ManagedOptimizer) and inner._managed is not None
