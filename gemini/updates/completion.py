"""Decides when a chunk can be updated within backward: its gradients are complete, and backward reads it no more.

Both are tracked per chunk. *Gradients*: the autograd engine accumulates all contributions to a leaf before its
AccumulateGrad node runs, and can be asked which of these nodes a backward will run; nodes that read a weight run before
its gradient is complete. *Calls of units*: the engine does not know of backwards that start within this one. A
reentrant checkpoint runs a backward for each segment, whose forward had no graph; a weight used in two segments gets a
gradient in each. So a chunk is not complete while a call of a unit that uses it is outstanding.

::

    call with a graph     outstanding until backward has run all of its nodes
    call without a graph  outstanding until backward has recomputed it, and has run all nodes of the recomputed call

Some calls stay outstanding: a head that has no part in the loss, a teacher without a graph, a layer whose output only
selects others (a checkpoint might still recompute it). `optimizer.step()` updates their chunks. The numbers are the
same; the gradients take memory for longer.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chunk import QUIET, Chunk, ChunkManager
from ..torch_private import will_run
from ..units.units import Unit, Visit


class Completion:
    """Outstanding gradients and calls of each chunk since the last step.

    Parameters
    ----------
    manager
        The chunk manager.
    """

    def __init__(self, manager: ChunkManager) -> None:
        self._nodes: list[tuple[int, int, Any]] = []
        """Chunk, position, and the AccumulateGrad node of each parameter (referenced here, because torch makes a new
        one for each graph otherwise)."""
        self._manager = manager
        self._tasks: set[int] = set()
        self._awaited: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
        """Chunk -> (backward, position) of outstanding gradients."""
        self._calls: defaultdict[int, set[Visit]] = defaultdict(set)
        """Chunk -> outstanding calls with a graph."""
        self._without_graph: Counter[Unit] = Counter()
        """The number of outstanding calls without a graph of each unit."""
        self._borrowed: defaultdict[Unit, set[Chunk]] = defaultdict(set)
        """Chunks that such calls use beside those of their unit."""
        self._recomputed: set[Visit] = set()
        """Calls with a graph that were made within backward."""

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Track the gradients of those parameters that are in trainable chunks."""
        for parameter in parameters:
            place = self._manager.find(parameter)
            if place is not None and place[0].is_trainable:
                with QUIET():
                    node = torch.autograd.graph.get_gradient_edge(parameter).node
                self._nodes.append((place[0].index, place[1], node))

    def is_over(self, chunk: Chunk) -> bool:
        """True if neither a gradient nor a call is outstanding. A unit that runs just now may still use the chunk."""
        if self._awaited[chunk.index] or self._calls[chunk.index]:
            return False
        return not any(chunk in unit.chunks or chunk in self._borrowed[unit] for unit in self._without_graph)

    def is_complete(self, chunk: Chunk) -> bool:
        """True if it has gradients, all of this backward, and nothing uses it any more."""
        gradient = chunk.gradient
        return gradient is not None and bool(gradient.present) and not chunk.pins and self.is_over(chunk)

    @property
    def is_idle(self) -> bool:
        """True outside of any backward."""
        return not self._tasks

    # -- events, as the hooks report them

    def begin(self, task: int) -> bool:
        """A backward, maybe nested in another, runs its first node; False if it is known. Called on its own thread."""
        if task in self._tasks:
            return False
        self._tasks.add(task)
        for chunk, position, node in self._nodes:
            if _will_run(node):
                self._awaited[chunk].add((task, position))
        return True

    def arrived(self, chunk: Chunk, position: int, task: int) -> None:
        """A gradient has all contributions of this backward."""
        self._awaited[chunk.index].discard((task, position))

    def end(self, task: int) -> bool:
        """A backward has ended; True if it was the outermost."""
        self._tasks.discard(task)
        for awaited in self._awaited.values():
            awaited.difference_update([item for item in awaited if item[0] == task])
        return not self._tasks

    def called(self, visit: Visit, has_graph: bool, in_backward: bool) -> None:
        """A unit's forward has ended, in a training forward or within backward."""
        if not in_backward and has_graph:
            for chunk in visit.chunks:
                self._calls[chunk.index].add(visit)
        elif has_graph:
            # A reentrant checkpoint runs this graph, other ones only take saved tensors from it: `left` tells which.
            self._recomputed.add(visit)
        elif not (in_backward and self._without_graph[visit.unit]):
            self._without_graph[visit.unit] += 1
            self._borrowed[visit.unit].update(visit.extra)

    def left(self, visit: Visit) -> None:
        """Backward has run all nodes of a call."""
        for chunk in visit.chunks:
            self._calls[chunk.index].discard(visit)
        if visit in self._recomputed:
            self._recomputed.discard(visit)
            self._without_graph[visit.unit] -= 1
        self._without_graph = +self._without_graph  # without zeros

    def forget(self) -> None:
        """Drop all, after a step or a backward that failed."""
        self._tasks.clear()
        self._awaited.clear()
        self._calls.clear()
        self._without_graph.clear()
        self._borrowed.clear()
        self._recomputed.clear()


def _will_run(node: Any) -> bool:
    try:
        return bool(will_run(node))
    except RuntimeError:  # torch.autograd.grad(loss, parameters) hands the gradient out, and the parameter gets none
        return False
