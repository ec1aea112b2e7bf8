"""Parameters that an update is due for, column by column.

Column by column and with ``map``: what torch says about one tensor takes Python 0.1 microseconds, and it takes 20 such
questions to know that a kernel may have it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from ..rules.moments import slots
from .fitting import called, check_apart, check_dtype, check_gradient, check_parameter, check_states
from .parameter_state import LOW_PRECISION, PARAM_DTYPES, completed

Dtypes = tuple[torch.dtype, torch.dtype]
"""Of a parameter and its gradient."""

_dtype, _grad, _layout = attrgetter("dtype"), attrgetter("grad"), attrgetter("layout")


@dataclass(frozen=True, slots=True)
class Found:
    """Parameters that have a gradient, and what belongs to each."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    dtypes: Sequence[Dtypes]
    states: Sequence[dict[str, Any]]
    """All that an update needs (`parameter_state.completed`)."""
    is_new: bool
    """Some of the states are not yet the optimizer's."""

    def __len__(self) -> int:
        return len(self.params)

    def rows(self, rows: Sequence[int]) -> "Found":
        """Some of them, in this order."""
        return Found(
            [self.params[i] for i in rows],
            [self.grads[i] for i in rows],
            [self.dtypes[i] for i in rows],
            [self.states[i] for i in rows],
            self.is_new,
        )

    def by_dtypes(self) -> dict[Dtypes, Sequence[int]]:
        """The rows of each pair of dtypes."""
        kinds = dict.fromkeys(self.dtypes)
        if len(kinds) == 1:
            return {kind: range(len(self)) for kind in kinds}
        return {kind: [i for i, other in enumerate(self.dtypes) if other == kind] for kind in kinds}

    def check(self, group: Mapping[str, Any], kept_as: str) -> None:
        """Raise ``ValueError`` where a parameter, its gradient and its state do not fit each other."""
        kept = slots(kept_as)
        for param, grad, state in zip(self.params, self.grads, self.states, strict=True):
            what = called(group, param)
            check_dtype(param, kept_as)
            check_parameter(param, what)
            check_gradient(param, grad, what)
            check_states(param, state, kept, kept_as, what)
        check_apart(self.states)


NONE = Found((), (), (), (), is_new=False)


def find(params: Iterable[Tensor], known: Callable[[Tensor], dict[str, Any] | None], kept_as: str) -> Found:
    """The parameters that have a gradient which can be used.

    Parameters
    ----------
    known
        The state that a parameter has, if any.
    kept_as
        How moments are kept (`moments.slots`).

    Raises
    ------
    TypeError
        If a gradient cannot be used.
    """
    having = [param for param in params if param.grad is not None]
    grads = list(map(_grad, having))
    dtypes = list(zip(map(_dtype, having), map(_dtype, grads), strict=True))
    if not set(map(_layout, chain(having, grads))) <= {torch.strided}:
        param = next(p for p in having if {p.layout, p.grad.layout} != {torch.strided})  # type: ignore[union-attr]
        raise TypeError(
            f"HybridAdam does not support sparse parameters and gradients (parameter of shape {tuple(param.shape)}); "
            "use Embedding(sparse=False), or torch.optim.SparseAdam for these parameters"
        )
    for dtype, grad_dtype in set(dtypes):
        if grad_dtype not in PARAM_DTYPES or (grad_dtype == torch.float64) != (dtype == torch.float64):
            raise TypeError(f"a gradient of {grad_dtype} cannot update a parameter of {dtype}")
    low = {kind for kind in set(dtypes) if kind[0] in LOW_PRECISION}
    before = list(map(known, having))
    # `completed` is asked only for those that lack something: after the first step hardly ever one does.
    states = [
        state
        if state is not None and "step" in state and ("master" in state) == (kind in low)
        else completed(state, param, kept_as)
        for state, param, kind in zip(before, having, dtypes, strict=True)
    ]
    return Found(having, grads, dtypes, states, is_new=any(map(is_not, states, before)))
