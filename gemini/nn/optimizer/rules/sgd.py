"""SGD on flat pieces without copies: of all rules it moves the fewest bytes, so a copy beside would cost most."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import pieces


def is_plain_form(options: Mapping[str, Any]) -> bool:
    """Whether these options of ``torch.optim.SGD`` ask for what `SgdUpdate` does; the others go to torch's own code."""
    return not (options["foreach"] or options["fused"] or isinstance(options["weight_decay"], Tensor))


@dataclass(frozen=True, slots=True, kw_only=True)
class SgdUpdate:
    """One step of ``torch.optim.SGD`` (a `BoundUpdate`), with the operations of its plain form, in its order."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    is_first: bool
    """The momentum begins as the gradient, without dampening."""
    grad_scale: float

    @staticmethod
    def of(options: Mapping[str, Any], step: int, grad_scale: float) -> "SgdUpdate":
        return SgdUpdate(
            lr=float(options["lr"]),
            momentum=float(options["momentum"]),
            dampening=float(options["dampening"]),
            weight_decay=float(options["weight_decay"]),
            nesterov=bool(options["nesterov"]),
            maximize=bool(options["maximize"]),
            is_first=step == 1,
            grad_scale=grad_scale,
        )

    def atomic_numel(self, device: torch.device) -> int | None:
        return None

    def apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, out: Tensor | None = None) -> None:
        # All memory is there before the first write, so any number of elements is all or nothing.
        scratch = pieces.scratch(param) if self._changes(grad) else None

        def work(piece: slice) -> None:
            self._step(param[piece], [state[piece] for state in states], grad[piece], scratch)
            if out is not None:
                out[piece].copy_(param[piece])

        pieces.run(work, pieces.all_of(param), param.device)

    def _changes(self, grad: Tensor) -> bool:
        """Whether the gradient that counts is another than the one given."""
        is_plain = grad.dtype == torch.float32 and self.grad_scale == 1.0
        return not is_plain or self.maximize or self.weight_decay != 0 or self.nesterov

    def _step(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, scratch: "deque[Tensor] | None") -> None:
        changed = scratch.pop() if scratch is not None else None
        if changed is not None:
            grad = self._changed(param, grad, changed[: param.numel()])
        if self.momentum != 0:
            (momentum,) = states
            if self.is_first:
                momentum.copy_(grad)
            else:
                momentum.mul_(self.momentum).add_(grad, alpha=1 - self.dampening)
            grad = grad.add_(momentum, alpha=self.momentum) if self.nesterov else momentum
        param.add_(grad, alpha=-self.lr)
        if scratch is not None and changed is not None:
            scratch.append(changed)

    def _changed(self, param: Tensor, grad: Tensor, changed: Tensor) -> Tensor:
        changed.copy_(grad)
        if self.grad_scale != 1.0:
            changed.mul_(self.grad_scale)
        if self.maximize:
            changed.neg_()
        if self.weight_decay != 0:
            changed.add_(param, alpha=self.weight_decay)
        return changed
