"""From autograd's nodes to the engine: backward enters a visit before its first node, and leaves after the last.

A prehook on the autograd node of each output enters. What comes first of these leaves:

- hooks after the last nodes that the unit made, where these are known (see `subgraph`);
- hooks on the gradients of its inputs: nodes run in reverse order of creation, so when these gradients are complete
  every node of the unit has run, and maybe much more, if others read the same tensor. Where an input is a leaf, needs
  no gradient or was changed in place, they say nothing;
- the end of the backward.

No ``autograd.Function``, no tensor subclass.

What no hook brackets is held until the optimizer has stepped: a unit whose results cannot be seen, and in a backward
that will itself be differentiated whatever it uses, because the nodes that it makes belong to no unit.

Hooks on autograd nodes hold a visit, and of the engine a weak reference only: the garbage collector does not see
through nodes, and a model that keeps a tensor with a graph would keep itself.
"""

import sys
from collections.abc import Callable, Collection
from functools import partial
from itertools import chain
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..chunk import Chunk
from ..engine import Engine
from ..planning.trace import Phase
from ..torch_private import at_end_of_backward, current_backward, next_number, number_of
from ..units.observer import tensors_in
from ..units.results import Results
from ..units.subgraph import first_nodes, last_nodes, unreachable
from ..units.units import Countdown, Unit, Visit

_OUTSIDE = Unit(-1, "code outside of any unit", None, ())


class BackwardHooks:
    """Puts hooks on the autograd nodes that calls of units make.

    Parameters
    ----------
    engine
        Told what backward enters and leaves.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._itself = ref(engine)

    def watch(self, visit: Visit, inputs: list[Tensor], output: Any, results: Results | None) -> bool:
        """Have backward enter and leave a visit whose forward is over.

        Parameters
        ----------
        inputs
            Those that need a gradient.
        output
            None after an exception.
        results
            What the forward has made, where that is watched.

        Returns
        -------
        bool
            True if the unit has made another graph than when it was watched, part of which may be out of sight.
        """
        unit = visit.unit
        kept = tuple(getattr(unit.module, name, None) for name in unit.graph_attributes)
        own = range(0) if visit.begin is None else range(visit.begin.number, next_number())
        nodes = first_nodes(chain(tensors_in(output), tensors_in(kept), inputs), visit.input_nodes, own)
        if results is not None and visit.begin is not None and visit.chunks and not _is_raising():
            leaked = unreachable(results.since(visit.begin), nodes, own)
            unit.was_watched(bool(leaked))
            nodes |= leaked
        self._enter_before(visit, nodes)
        if not nodes:
            if output is not None and _makes_gradients(visit, inputs):
                self._engine.pins.hold(visit.chunks)
            return False
        last = last_nodes(nodes, visit.input_nodes, own)
        self._leave_after(visit, [node.register_hook for node in last])
        is_changed = results is None and unit.graph_is_contained and not last
        if results is not None or is_changed:
            unit.contains_graph(bool(last))
        if is_changed:
            self._engine.pins.hold(visit.chunks)
        if all(t.grad_fn is not None and t.grad_fn in visit.input_nodes for t in inputs):
            # Not register_multi_grad_hook: its closure holds the nodes that hold it, and such graphs are never freed.
            self._leave_after(visit, [t.register_hook for t in {id(t): t for t in inputs}.values()])
        return is_changed

    def bring(self, begin: int, result: Any, chunks: tuple[Chunk, ...]) -> None:
        """Have these chunks there when backward comes to what an operation outside of any unit made.

        Parameters
        ----------
        begin
            The number of the first autograd node that it may have made.
        result
            What it returned.
        """
        own = range(begin, next_number())
        nodes = {node for node in first_nodes(tensors_in(result), (), own) if number_of(node) in own}
        if nodes:
            visit = Visit(_OUTSIDE, extra=chunks)
            self._enter_before(visit, nodes)
            self._leave_after(visit, [node.register_hook for node in last_nodes(nodes, _NotIn(own), own)])

    def _enter_before(self, visit: Visit, nodes: Collection[Any]) -> None:
        """Have backward enter a visit before it runs the first of these."""
        before = partial(_enter, self._itself, visit)
        for node in nodes:
            node.register_prehook(before)

    def _leave_after(self, visit: Visit, hookings: "list[Callable[[Callable[..., None]], object]]") -> None:
        """Have backward leave a visit when each of these has called its hook."""
        if hookings:
            countdown = Countdown(len(hookings))
            visit.countdowns.append(countdown)
            for hook_on in hookings:
                hook_on(partial(_count, self._itself, visit, countdown))


def _enter(reference: "ref[Engine]", visit: Visit, gradients: Any) -> None:
    engine = reference()
    if engine is None:
        return
    task = current_backward()
    if engine.join_backward(task, visit):
        at_end_of_backward(partial(engine.end_backward, task))
    if not visit.is_open:
        for countdown in visit.countdowns:
            countdown.restart()
        if visit.unit is _OUTSIDE:
            engine.enter_outside(visit)
        else:
            engine.enter(visit, Phase.BACKWARD)
    if torch.is_grad_enabled():  # create_graph=True
        engine.pins.hold(visit.chunks)


def _count(reference: "ref[Engine]", visit: Visit, countdown: Countdown, *gradients: Any) -> None:
    engine = reference()
    # What this backward does not come to is never counted: the visit then ends with the backward.
    if engine is not None and countdown.tick():
        engine.leave_backward(visit)


class _NotIn:
    """Every autograd node whose number is not in a range."""

    def __init__(self, own: range) -> None:
        self._own = own

    def __contains__(self, node: Any) -> bool:
        return number_of(node) not in self._own


def _is_raising() -> bool:
    """True while an exception is handled: its traceback keeps what calls have made."""
    return sys.exc_info()[0] is not None


def _makes_gradients(visit: Visit, inputs: list[Tensor]) -> bool:
    """False for what has no part in any backward, such as a frozen module on data."""
    module = visit.unit.module
    own = () if module is None else module.parameters(recurse=False)
    return bool(inputs) or any(parameter.requires_grad for parameter in own)
