"""Models that hand parts of their graph to somebody else."""

from collections.abc import Callable
from typing import Any

from odd_models import weight
from torch import Tensor, nn
from torch.nn import functional


class TellsSomebody(nn.Module):
    """A penalty goes to somebody else: it is neither in the output nor in an attribute.

    Parameters
    ----------
    tell
        Who gets it.
    inner
        A module that is given what the first half has computed, and that tells instead.
    lender
        A module whose weight is used instead of one of its own.
    silent
        For how many calls nothing is told.
    """

    def __init__(
        self,
        tell: Callable[[Tensor], None],
        inner: nn.Module | None = None,
        lender: "TellsSomebody | None" = None,
        silent: int = 0,
    ) -> None:
        super().__init__()
        self.tell, self.inner, self.silent = tell, inner, silent
        self.weight = weight() if lender is None else None
        self.weight_in_use: Callable[[], Any] = lambda: self.weight if lender is None else lender.weight

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight_in_use()
        y = functional.linear(x, w).tanh()
        if self.inner is not None:
            return y + self.inner(y.sin())
        if self.silent:
            self.silent -= 1
        else:
            self.tell((functional.linear(y.detach(), w) ** 2).mean())
            self.tell((functional.linear(y, w) ** 3).mean())
        return y


class Gossips(nn.Module):
    """Its loss needs what its parts have told it, or nothing else."""

    def __init__(self, uses_outputs: bool, silent: int = 0) -> None:
        super().__init__()
        told: list[Tensor] = []
        self.take = lambda: [told.pop() for _ in range(len(told))]
        self.uses_outputs = uses_outputs
        self.first = TellsSomebody(told.append, silent=silent)
        self.outer = TellsSomebody(told.append, inner=TellsSomebody(told.append, silent=silent))
        self.layers = nn.ModuleList([TellsSomebody(told.append, silent=silent) for _ in range(3)])
        self.borrower = TellsSomebody(told.append, lender=self.first, silent=silent)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.outer, *self.layers, self.borrower):
            x = part(x)
        penalty = sum(self.take(), x.new_zeros(()))
        return x.mean() + penalty if self.uses_outputs else penalty
