"""Learning rate schedules by ColossalAI's names and arguments, on torch's.

Those with a warm-up, and polynomials, are functions of the step alone (`_Schedule`): nothing adds up from step to step,
so they go on exactly from ``last_epoch`` or from a state dict. The others are torch's, under the arguments that
ColossalAI gives them. ``total_steps`` counts calls of ``step()``.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler


class _Schedule(LRScheduler):
    """A learning rate that depends on the step alone."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [self.rate(float(base), self.last_epoch) for base in self.base_lrs]

    def rate(self, base: float, step: int) -> float:
        """The learning rate of a group that began with ``base``."""
        raise NotImplementedError


class _Warmup(_Schedule):
    """Rises linearly to a group's learning rate in ``warmup_steps`` steps, of which the first is not 0."""

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int, last_epoch: int) -> None:
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(f"warmup_steps must be from 0 to total_steps, {total_steps}, got {warmup_steps}")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, last_epoch)

    def rate(self, base: float, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps * base
        return self.after_warmup(base, step - self.warmup_steps)

    def after_warmup(self, base: float, step: int) -> float:
        """The learning rate of a step, counted from the end of the warm-up."""
        raise NotImplementedError


class LinearWarmupLR(_Schedule):
    """Rises linearly, then falls linearly to 0 at ``total_steps``, and stays there.

    Parameters
    ----------
    optimizer
        Its groups' learning rates are the highest ones.
    total_steps, warmup_steps
        Of the whole schedule, and of its rise.
    last_epoch
        The step to go on from; -1 begins.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, last_epoch: int = -1) -> None:
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, last_epoch)

    def rate(self, base: float, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1) * base
        return max(0, self.total_steps - step) / max(1, self.total_steps - self.warmup_steps) * base


class FlatAnnealingWarmupLR(_Warmup):
    """Rises linearly, stays for a share ``pct_start`` of the rest, then falls as half a cosine to ``eta_min``.

    Raises
    ------
    ValueError
        If ``pct_start`` is not from 0 to 1, or the warm-up is longer than the schedule.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        pct_start: float = 0.72,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0.0 <= pct_start <= 1.0:
            raise ValueError(f"pct_start must be from 0 to 1, got {pct_start}")
        self.flat_steps = int((total_steps - warmup_steps) * pct_start)
        self.eta_min = eta_min
        super().__init__(optimizer, total_steps, warmup_steps, last_epoch)

    def after_warmup(self, base: float, step: int) -> float:
        if step <= self.flat_steps:
            return base
        falling_steps = self.total_steps - self.warmup_steps - self.flat_steps
        turn = math.pi * (step - self.flat_steps) / max(1, falling_steps)
        return self.eta_min + (base - self.eta_min) * (1 + math.cos(turn)) / 2


class FlatAnnealingLR(FlatAnnealingWarmupLR):
    """Stays for a share ``pct_start`` of the steps, then falls as half a cosine to 0. Raises as its base does."""

    def __init__(self, optimizer: Optimizer, total_steps: int, pct_start: float = 0.72, last_epoch: int = -1) -> None:
        super().__init__(optimizer, total_steps, pct_start=pct_start, last_epoch=last_epoch)


class CosineAnnealingWarmupLR(FlatAnnealingWarmupLR):
    """Rises linearly, then falls as half a cosine to ``eta_min``. ValueError if the warm-up is too long."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, total_steps, warmup_steps, 0.0, eta_min, last_epoch)


class MultiStepWarmupLR(_Warmup):
    """Rises linearly, then is multiplied by ``gamma`` at each of the ``milestones`` (steps from the beginning on).

    Raises
    ------
    ValueError
        If there are no milestones, or the warm-up is longer than the schedule.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        milestones: Sequence[int] | None = None,
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        # Those within the warm-up have no effect.
        self.milestones = [each - warmup_steps for each in _given(milestones) if each >= warmup_steps]
        self.gamma = gamma
        super().__init__(optimizer, total_steps, warmup_steps, last_epoch)

    def after_warmup(self, base: float, step: int) -> float:
        return float(base * self.gamma ** bisect_right(self.milestones, step))


class PolynomialWarmupLR(_Warmup):
    """Rises linearly, then falls as ``(1 - share of the steps) ** power`` to ``end_lr``, and stays there.

    Raises
    ------
    ValueError
        If ``end_lr`` is negative, or the warm-up is longer than the schedule.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        end_lr: float = 0.0001,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        if end_lr < 0:
            raise ValueError(f"end_lr must be 0 or more, got {end_lr}")
        self.end_lr = end_lr
        self.power = power
        super().__init__(optimizer, total_steps, warmup_steps, last_epoch)

    def after_warmup(self, base: float, step: int) -> float:
        steps = max(1, self.total_steps - self.warmup_steps)
        return float((base - self.end_lr) * (1 - min(step, steps) / steps) ** self.power + self.end_lr)


class PolynomialLR(PolynomialWarmupLR):
    """Falls as ``(1 - share of the steps) ** power`` to ``end_lr``, and stays there. Raises as its base does."""

    def __init__(
        self, optimizer: Optimizer, total_steps: int, end_lr: float = 0.0001, power: float = 1.0, last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, total_steps, 0, end_lr, power, last_epoch)


class CosineAnnealingLR(lr_scheduler.CosineAnnealingLR):
    """Torch's, over ``total_steps``."""

    def __init__(self, optimizer: Optimizer, total_steps: int, eta_min: float = 0.0, last_epoch: int = -1) -> None:
        super().__init__(optimizer, total_steps, eta_min, last_epoch)


class OneCycleLR(lr_scheduler.OneCycleLR):
    """Torch's, whose highest learning rates are those of the optimizer's groups. ``kwargs`` go to torch's."""

    def __init__(self, optimizer: Optimizer, total_steps: int, pct_start: float = 0.3, **kwargs: Any) -> None:
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, highest, total_steps=total_steps, pct_start=pct_start, **kwargs)


class MultiStepLR(lr_scheduler.MultiStepLR):
    """Torch's. ``total_steps`` makes no difference."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        milestones: Sequence[int] | None = None,
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, _given(milestones), gamma, last_epoch)


class StepLR(lr_scheduler.StepLR):
    """Torch's. ``total_steps`` makes no difference."""

    def __init__(
        self, optimizer: Optimizer, total_steps: int, step_size: int = 1, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        super().__init__(optimizer, step_size, gamma, last_epoch)


class ExponentialLR(lr_scheduler.ExponentialLR):
    """Torch's. ``total_steps`` makes no difference."""

    def __init__(self, optimizer: Optimizer, total_steps: int, gamma: float = 1.0, last_epoch: int = -1) -> None:
        super().__init__(optimizer, gamma, last_epoch)


class LambdaLR(lr_scheduler.LambdaLR):
    """Torch's. ``total_steps`` makes no difference."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        lr_lambda: Callable[[int], float] | list[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, lr_lambda, last_epoch)


class MultiplicativeLR(lr_scheduler.MultiplicativeLR):
    """Torch's. ``total_steps`` makes no difference."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        lr_lambda: Callable[[int], float] | list[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        super().__init__(optimizer, lr_lambda, last_epoch)


def _given(milestones: Sequence[int] | None) -> list[int]:
    if not milestones:
        raise ValueError(f"milestones must be the steps at which the learning rate changes, got {milestones!r}")
    return sorted(milestones)
