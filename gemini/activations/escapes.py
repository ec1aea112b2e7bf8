"""Whether a block leaves tensors with a graph where its caller does not see them, as in a list of auxiliary losses.

When its forward runs again it would leave them there a second time. Its first forward is watched operation by
operation; later ones only by whether all nodes that it made can be reached from its results, if that was so before.
"""

from enum import Enum
from typing import Any

from torch import Tensor, nn

from ..torch_private import is_compiled, next_number
from ..units.nested import tensors_in
from ..units.results import Mark, Results
from ..units.subgraph import first_nodes, is_contained, unreachable

MOST_NODES = 4096


class Escapes(Enum):
    """What is known of a block."""

    UNKNOWN = "unknown"
    """It has not been watched, or has made another graph since."""
    NONE = "none"
    """All that it made could be reached from its results."""
    UNSEEN = "unseen"
    """No tensor escaped when it was watched, and its graph does not tell whether one does later."""
    SOME = "some"
    """Tensors escape."""


class Watch:
    """Watches one call of a block, from before it until `found`.

    Parameters
    ----------
    module, inputs
        The block, and the tensors that it is given.
    known
        What is known of it.
    """

    def __init__(self, module: nn.Module, inputs: list[Tensor], known: Escapes) -> None:
        self._module = module
        self._known = known
        self._nodes = [tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None]
        self._results = None if is_compiled(module) or known is not Escapes.UNKNOWN else Results().__enter__()
        self._begin = next_number()

    def end(self) -> None:
        """Watch no longer."""
        if self._results is not None:
            self._results.__exit__(None, None, None)

    def found(self, output: Any) -> Escapes:
        """What is known now; `UNKNOWN` if this call may have let some escape, and the next one has to be watched."""
        own = range(self._begin, next_number())
        if self._known is Escapes.UNSEEN:
            return Escapes.UNSEEN
        nodes, _ = first_nodes(tensors_in(output), self._nodes, own)
        if not own or is_contained(nodes, own, MOST_NODES):
            return Escapes.NONE
        attributes = [list(vars(module).values()) for module in self._module.modules()]
        more, _ = first_nodes(tensors_in(attributes), self._nodes, own)
        nodes |= more
        if is_contained(nodes, own, MOST_NODES):
            return Escapes.NONE
        if self._results is None:
            return Escapes.UNSEEN if is_compiled(self._module) else Escapes.UNKNOWN
        escaped = unreachable(self._results.since(Mark(self._begin, 0)), nodes, own)
        return Escapes.SOME if escaped else Escapes.UNSEEN
