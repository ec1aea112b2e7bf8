"""Knows when a backward is through with a chunk: its gradients are complete, and nothing will read its parameters.

Two things are counted. *Gradients*: the autograd engine adds up all contributions to a parameter before the parameter
gets them, and says which parameters it will come to; nodes that need a weight run before its gradient is complete.
*Uses*: what the engine does not know is what it will be asked later within the same backward. A reentrant checkpoint
runs a backward of its own for each segment, after a forward without a graph; a weight used in two segments gets a
gradient in each. So calls of units that backward has not come to yet count too.

::

    call with a graph  --backward has been through it-->  over
    call without one   --backward has been through one that it made itself (a recomputation)-->  over

Where a call is never come to (a head without a part in the loss, a teacher without a graph, a layer whose output only
chooses among others, which a checkpoint may still run again), its chunks are left to `optimizer.step()`. That is never
wrong, it only takes room.
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
    """What is still to come for each chunk since the last step.

    Parameters
    ----------
    manager
        Has the chunks.
    """

    def __init__(self, manager: ChunkManager) -> None:
        self._nodes: list[tuple[int, int, Any]] = []
        """Chunk, position, and the node of the graph that takes this parameter's gradients (kept, or it would be made
        anew for each graph)."""
        self._manager = manager
        self._tasks: set[int] = set()
        self._awaited: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
        """Chunk -> (backward, position) of gradients that will come."""
        self._calls: defaultdict[int, set[Visit]] = defaultdict(set)
        """Chunk -> calls with a graph that backward has not been through."""
        self._without_graph: Counter[Unit] = Counter()
        """Calls of each unit without a graph that backward has not been through in another form."""
        self._borrowed: defaultdict[Unit, set[Chunk]] = defaultdict(set)
        """What such calls turned out to use beside their unit's own."""
        self._recomputed: set[Visit] = set()
        """Calls with a graph that backward made itself."""

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Expect gradients of those that are in chunks with room for them."""
        for parameter in parameters:
            place = self._manager.find(parameter)
            if place is not None and place[0].is_trainable:
                with QUIET():
                    node = torch.autograd.graph.get_gradient_edge(parameter).node
                self._nodes.append((place[0].index, place[1], node))

    def is_over(self, chunk: Chunk) -> bool:
        """True if backward is through with a chunk, but for units that are open just now."""
        if self._awaited[chunk.index] or self._calls[chunk.index]:
            return False
        return not any(chunk in unit.chunks or chunk in self._borrowed[unit] for unit in self._without_graph)

    @property
    def is_idle(self) -> bool:
        """True outside of any backward."""
        return not self._tasks

    # -- what hooks tell

    def begin(self, task: int) -> bool:
        """A backward (or one within it) shows itself for the first time, on its own thread; False if it is known."""
        if task in self._tasks:
            return False
        self._tasks.add(task)
        for chunk, position, node in self._nodes:
            if _will_run(node):
                self._awaited[chunk].add((task, position))
        return True

    def arrived(self, chunk: Chunk, position: int, task: int) -> None:
        """A gradient is complete, as far as this backward is concerned."""
        self._awaited[chunk.index].discard((task, position))

    def end(self, task: int) -> bool:
        """A backward is over; True if it was the outermost."""
        self._tasks.discard(task)
        for awaited in self._awaited.values():
            awaited.difference_update([item for item in awaited if item[0] == task])
        return not self._tasks

    def called(self, visit: Visit, has_graph: bool, in_backward: bool) -> None:
        """A unit's forward is over, within a forward that makes a graph or within backward."""
        if not in_backward and has_graph:
            for chunk in visit.chunks:
                self._calls[chunk.index].add(visit)
        elif has_graph:
            # Whether that graph is run (in a reentrant checkpoint) or only looked into (in another) shows when it is.
            self._recomputed.add(visit)
        elif not (in_backward and self._without_graph[visit.unit]):
            self._without_graph[visit.unit] += 1
            self._borrowed[visit.unit].update(visit.extra)

    def left(self, visit: Visit) -> None:
        """Backward has been through a call."""
        for chunk in visit.chunks:
            self._calls[chunk.index].discard(visit)
        if visit in self._recomputed:
            self._recomputed.discard(visit)
            self._without_graph[visit.unit] -= 1
        self._without_graph = +self._without_graph  # without zeros

    def forget(self) -> None:
        """The step is over, or its backward failed."""
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
