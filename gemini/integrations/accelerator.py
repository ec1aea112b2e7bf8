"""accelerate's `Accelerator`, for a model whose parameters are where chunks are."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from gemini.boosted import boosted, is_boosted
from gemini.config import GeminiConfig
from gemini.nn.optimizer.managed import ManagedOptimizer

from .clipping import clip_by_norm, has_all


class ManagedOptimizerWrapper(AcceleratedOptimizer):
    """accelerate's wrapper of an optimizer, which knows of steps that were skipped since fp16 gradients overflowed."""

    @property
    def step_was_skipped(self) -> bool:
        return bool(super().step_was_skipped) or bool(self.optimizer.step_was_skipped)


class ManagedAccelerator(Accelerator):
    """Moves data to the device, and leaves a boosted model and its optimizer where they are. Clips their gradients."""

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, **options: Any) -> nn.Module:
        if not is_boosted(model):
            return super().prepare_model(model, device_placement, **options)  # type: ignore[no-any-return]
        if self.scaler is not None:
            raise ValueError(
                'mixed_precision="fp16" of the accelerator unscales gradients through p.grad: leave it at "no", and '
                'give GeminiPlugin(precision="fp16"), which has a loss scale of its own'
            )
        # As for evaluation: not within DistributedDataParallel, since chunks sum the gradients of the ranks themselves.
        return super().prepare_model(model, False, **{**options, "evaluation_mode": True})  # type: ignore[no-any-return]

    def prepare_optimizer(self, optimizer: Optimizer, device_placement: bool | None = None) -> Optimizer:
        inner = unwrapped(optimizer)
        is_managed = isinstance(inner, ManagedOptimizer) and inner._managed is not None
        if not is_managed:
            return super().prepare_optimizer(optimizer, device_placement)  # type: ignore[no-any-return]
        if not isinstance(optimizer, AcceleratedOptimizer):
            optimizer = ManagedOptimizerWrapper(optimizer, device_placement=False, scaler=self.scaler)
        if not any(known is optimizer for known in self._optimizers):
            self._optimizers.append(optimizer)
        return optimizer

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """As accelerate's; on the scaled loss where the model computes in fp16."""
        scaling = [optimizer for config, optimizer in self._boosted() if config.precision == "fp16"]
        if len(scaling) > 1:
            raise ValueError("several models in fp16 have a loss scale each: call optimizer.backward(loss) of one")
        if scaling:
            scaling[0].backward(loss / self.gradient_accumulation_steps)
        else:
            super().backward(loss, **kwargs)

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor | float | None:
        """Clip, and return the norm before that; None where gradients are used up one by one and have no norm.

        A plugin with a ``max_norm`` of its own clips within the step, and nothing is clipped here.
        """
        parameters = list(parameters)
        config, optimizer = self._training(parameters)
        if config is None or optimizer is None:
            return super().clip_grad_norm_(parameters, max_norm, norm_type)  # type: ignore[no-any-return]
        if config.update_in_backward and math.isinf(max_norm):
            return None
        return clip_by_norm(optimizer, parameters, math.inf if config.max_norm > 0 else max_norm, norm_type)

    def clip_grad_value_(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        parameters = list(parameters)
        _, optimizer = self._training(parameters)
        if optimizer is None:
            super().clip_grad_value_(parameters, clip_value)
        else:
            optimizer.clip_grad_by_value(clip_value)

    def _training(self, parameters: Iterable[Tensor]) -> tuple[GeminiConfig | None, ManagedOptimizer | None]:
        """The optimizer that trains just these parameters, and how its model is boosted.

        Gradients of a part of a model are clipped through ``p.grad``, which says so where it cannot be.
        """
        parameters = list(parameters)
        for config, optimizer in self._boosted():
            if has_all(optimizer, parameters):
                return config, optimizer
        return None, None

    def _boosted(self) -> Iterator[tuple[GeminiConfig, ManagedOptimizer]]:
        """How each model that is trained in chunks is boosted, and its optimizer."""
        for model in self._models:
            if is_boosted(model) and (optimizer := boosted(model).optimizer) is not None:
                yield boosted(model).config, optimizer


def managed(accelerator: Accelerator) -> Accelerator:
    """Make an accelerator that somebody else has constructed a `ManagedAccelerator`, in place."""
    cls = type(accelerator)
    if not issubclass(cls, ManagedAccelerator):
        accelerator.__class__ = type(cls.__name__, (ManagedAccelerator, cls), {"__module__": cls.__module__})
    return accelerator


def unwrapped(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer within accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
