"""SGD on flat pieces without copies: of all rules it moves the fewest bytes, so a copy beside would cost most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import pieces


def is_plain_form(options: Mapping[str, Any]) -> bool:
    """Whether these options of ``torch.optim.SGD`` ask for what `SgdAtStep` does; the others go to torch's own code."""
    return not (options["foreach"] or options["fused"] or isinstance(options["weight_decay"], Tensor))


@dataclass(frozen=True, slots=True, kw_only=True)
class SgdAtStep:
    """One step of ``torch.optim.SGD`` (an `AtStep`), with the operations of its plain form, in its order."""

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
    def of(options: Mapping[str, Any], step: int, grad_scale: float) -> "SgdAtStep":
        return SgdAtStep(
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
        return pieces.atomic_numel(device)

    def apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, out: Tensor | None = None) -> None:
        ready: dict[int, tuple[Tensor, Tensor | None]] = {}

        def prepare(piece: slice) -> None:
            ready[piece.start] = self._prepared(param[piece], grad[piece])

        def commit(piece: slice) -> None:
            self._commit(param[piece], [state[piece] for state in states], *ready.pop(piece.start))
            if out is not None:
                out[piece].copy_(param[piece])

        for group in pieces.groups(param.numel(), param.device):
            pieces.run(prepare, group)  # all allocations come before the first write
            pieces.run(commit, group)

    def _prepared(self, param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient that counts, and room for one more where Nesterov's is needed."""
        grad = grad.float()
        if self.grad_scale != 1.0:
            grad = grad * self.grad_scale
        if self.maximize:
            grad = -grad
        if self.weight_decay != 0:
            grad = grad.add(param, alpha=self.weight_decay)
        return grad, torch.empty_like(grad) if self.momentum != 0 and self.nesterov else None

    def _commit(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, room: Tensor | None) -> None:
        if self.momentum != 0:
            (momentum,) = states
            if self.is_first:
                momentum.copy_(grad)
            else:
                momentum.mul_(self.momentum).add_(grad, alpha=1 - self.dampening)
            grad = momentum if room is None else torch.add(grad, momentum, alpha=self.momentum, out=room)
        param.add_(grad, alpha=-self.lr)
