"""From autograd's nodes to the engine: backward enters a visit before its first node, and leaves it after the last.

A prehook on the autograd node of each output enters. Nothing has to be hooked for leaving: a thread numbers the nodes
that it makes, and of those that are ready backward runs the one with the highest number. So when it comes to a node
with a lower number than all of a visit's, these have run. What it has passed in this way it leaves when it comes to
the next visit, or at its end.

No ``autograd.Function``, no tensor subclass.

What no hook brackets is held until the optimizer has stepped: a unit whose results cannot be seen, and in a backward
that will itself be differentiated whatever it uses, because the nodes that it makes belong to no unit.

Hooks on autograd nodes hold a visit, and of the engine a weak reference only: the garbage collector does not see
through nodes, and a model that keeps a tensor with a graph would keep itself.
"""

import sys
from collections.abc import Collection
from functools import partial
from operator import attrgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..chunk import Chunk
from ..engine import Engine
from ..planning.trace import Phase
from ..signals import uninterrupted
from ..torch_private import at_end_of_backward, current_backward, next_number, number_of
from ..units.nested import tensors_in
from ..units.results import Mark, Results
from ..units.subgraph import first_nodes, is_contained, unreachable
from ..units.units import Unit, Visit

_moved_bytes = attrgetter("full_nbytes")
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
        own = range(0) if visit.begin is None else range(visit.begin.number, next_number())
        made = tensors_in(output)
        if unit.graph_attributes:
            made += tensors_in([getattr(unit.module, name, None) for name in unit.graph_attributes])
        nodes, entries = first_nodes([*made, *inputs], visit.input_nodes, own)
        if results is not None and visit.begin is not None and visit.chunks and not _is_raising():
            leaked = unreachable(results.since(visit.begin), nodes, own)
            unit.was_watched(bool(leaked))
            nodes |= leaked
            entries |= leaked
        self._enter_before(visit, entries)
        if not nodes:
            if output is not None and _makes_gradients(visit, inputs):
                self._engine.pins.hold(visit.chunks)
            return False
        if results is not None:
            unit.contains_graph(is_contained(nodes, own))
        elif unit.graph_is_contained and any(map(_moved_bytes, visit.chunks)) and not is_contained(nodes, own):
            unit.contains_graph(False)
            self._engine.pins.hold(visit.chunks)
            return True
        return False

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
        nodes = {node for node in first_nodes(tensors_in(result), (), own)[1] if number_of(node) in own}
        if nodes:
            visit = Visit(_OUTSIDE, extra=chunks, begin=Mark(begin, 0))
            self._enter_before(visit, nodes)

    def _enter_before(self, visit: Visit, nodes: Collection[Any]) -> None:
        """Have backward enter a visit before it runs the first of these."""
        before = partial(_enter, self._itself, visit)
        for node in nodes:
            node.register_prehook(before)


@uninterrupted
def _enter(reference: "ref[Engine]", visit: Visit, gradients: Any) -> None:
    engine = reference()
    if engine is None:
        return
    task = current_backward()
    engine.leave_passed(task)
    if engine.join_backward(task, visit):
        at_end_of_backward(uninterrupted(partial(engine.end_backward, task)))
    if visit.unit is _OUTSIDE:
        engine.enter_outside(visit)
    else:
        engine.enter(visit, Phase.BACKWARD)
    if torch.is_grad_enabled():  # create_graph=True
        engine.pins.hold(visit.chunks)


def _is_raising() -> bool:
    """True while an exception is handled: its traceback keeps what calls have made."""
    return sys.exc_info()[0] is not None


def _makes_gradients(visit: Visit, inputs: list[Tensor]) -> bool:
    """False for what has no part in any backward, such as a frozen module on data."""
    module = visit.unit.module
    own = () if module is None else module.parameters(recurse=False)
    return bool(inputs) or any(parameter.requires_grad for parameter in own)
