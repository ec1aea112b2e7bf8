"""The step of parameters outside of chunks, in two halves, so that it is all or nothing.

`prepare` does all that can fail: it looks at gradients and hyperparameters, makes missing states, flattens layouts and
compiles kernels. `PreparedStep.commit` then only runs kernels over memory that is there.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.arithmetic import AdamHyper, AdamScalars, scalars
from ..kernels.reference import adam_float64
from ..kernels.update import adam_update
from ..managed import Prepared
from ..rules.moments import slots
from .batch import States, in_batches
from .found import find
from .memory_order import copy_back, flatten, memory_order
from .parameter_state import flat_states, needs_master


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One parameter's update, of which nothing has happened yet."""

    param: Tensor
    state: dict[str, Any]
    step: int
    scalars: AdamScalars | None
    """None: ``flat`` holds the new values already."""
    written: tuple[Tensor, ...]
    """The tensors that change: parameter or master, the states, and the parameter if it has a master."""
    flat: tuple[Tensor, ...]
    """The same, one-dimensional, as views where their layout allows it."""
    gradient: Tensor | None
    kept_as: str
    """How the moments are kept (`moments.slots`)."""

    def commit(self, states: States) -> None:
        """Do it."""
        if self.scalars is not None:
            assert self.gradient is not None
            master, *kept = self.flat
            out = kept.pop() if needs_master(self.param) else None
            adam_update(self.kept_as, (master, *kept), self.gradient, self.scalars, out)
        order = memory_order(self.param)
        for flat, tensor in zip(self.flat, self.written, strict=True):
            copy_back(flat, tensor, order)
        self.state["step"].fill_(self.step)
        states[self.param] = self.state
        # Kernels write behind autograd's back: let it notice a graph that still needs the old value.
        torch.autograd.graph.increment_version(self.param)


def prepare(
    group: Mapping[str, Any],
    params: Iterable[Tensor],
    states: Mapping[Any, dict[str, Any]],
    grad_scale: float = 1.0,
    kept_as: str = "fp32",
) -> list[Prepared]:
    """Make ready the update of those ``params`` that have a gradient.

    Parameters
    ----------
    group
        Their parameter group.
    states
        Of the optimizer; not changed.
    grad_scale
        Multiplied into the gradients on the fly; they are not changed.
    kept_as
        How the moments are kept (`moments.slots`).

    Raises
    ------
    TypeError, ValueError
        If a gradient or a hyperparameter cannot be used, or a gradient or a state does not fit its parameter.
    """
    hyper = AdamHyper.of_group(group)
    of_step: dict[int, AdamScalars] = {}  # parameters may have seen different numbers of gradients

    def at_step(step: int) -> AdamScalars:
        if step not in of_step:
            of_step[step] = scalars(hyper, step, grad_scale)
        return of_step[step]

    found = find(params, states.get, kept_as)
    batches, others = in_batches(found, at_step, kept_as)
    others.check(group, kept_as)
    columns = zip(others.params, others.grads, others.states, strict=True)
    singles = [_prepared(param, grad, state, hyper, at_step, grad_scale, kept_as) for param, grad, state in columns]
    return [*batches, *singles]


def _prepared(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    hyper: AdamHyper,
    at_step: Callable[[int], AdamScalars],
    grad_scale: float,
    kept_as: str,
) -> PreparedStep:
    step = int(state["step"].item()) + 1
    if param.dtype == torch.float64:
        moments = (state["exp_avg"], state["exp_avg_sq"])
        new = tuple(tensor.detach().clone() for tensor in (param, *moments))
        adam_float64(new[0], new[1], new[2], grad, hyper, step, grad_scale)
        order = memory_order(param)
        return PreparedStep(
            param, state, step, None, (param, *moments), tuple(flatten(t, order) for t in new), None, kept_as
        )
    order = memory_order(param)
    # Without a master the parameter is its own.
    has_master = needs_master(param)
    master = state["master"] if has_master else param
    copy = ((param, flatten(param, order)),) if has_master else ()
    pairs = ((master, flatten(master, order)), *flat_states(state, order, kept_as), *copy)
    written, flat = zip(*pairs, strict=True)
    gradient = flatten(grad, order)
    _have_kernel(param.device, gradient.dtype, param.dtype if has_master else None, at_step(step).l2 != 0.0, kept_as)
    return PreparedStep(param, state, step, at_step(step), written, flat, gradient, kept_as)


_SMALL_NUMEL = 64


@functools.cache
def _have_kernel(
    device: torch.device, grad_dtype: torch.dtype, out_dtype: torch.dtype | None, has_l2: bool, kept_as: str
) -> None:
    """Compile and load the kernel for these types, and start its threads. All that takes memory, and may fail."""
    param = torch.zeros(_SMALL_NUMEL, dtype=torch.float32, device=device)
    kept = [slot.zeros(_SMALL_NUMEL, device) for slot in slots(kept_as)]
    grad = torch.zeros(_SMALL_NUMEL, dtype=grad_dtype, device=device)
    out = None if out_dtype is None else torch.zeros(_SMALL_NUMEL, dtype=out_dtype, device=device)
    weight_decay = 0.1 if has_l2 else 0.0
    hyper = AdamHyper(
        lr=0.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, decoupled=False, bias_correction=True
    )
    adam_update(kept_as, (param, *kept), grad, scalars(hyper, 1), out)
