"""Results of operations in a unit, to find those with a graph that are in neither its outputs nor its attributes.

A result that is kept elsewhere (in a list of auxiliary losses, say) leads backward into a unit by a node that cannot be
reached from the outputs. It is found among all results with a graph that are alive when the call is over. Watching
costs microseconds for each operation, so it is done in the first cycle of each kind, and later only while a unit runs
that is new or known to leak its graph.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..torch_private import current_function_mode, next_number


class Mark(NamedTuple):
    """A point in time: results and nodes are made before or after it."""

    number: int
    """The number of the next autograd node."""
    result: int
    """The number of results before it."""


class Results(TorchFunctionMode):
    """Remembers the results of all operations that have a graph, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[ReferenceType[Tensor]] = []
        self._is_paused = False

    def mark(self) -> Mark:
        """Return the point in time that is now."""
        return Mark(next_number(), len(self._made))

    def since(self, mark: Mark) -> Iterator[Tensor]:
        """Results made after ``mark`` that are alive: the program holds them, or a graph has saved them."""
        for made in self._made[mark.result :]:
            tensor = made()
            if tensor is not None:
                yield tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor) and item.requires_grad:
                self._made.append(ref(item))
        return result

    def __exit__(self, *exc: Any) -> None:
        self.resume()
        super().__exit__(*exc)

    def pause(self) -> None:
        """Watch nothing until `resume`: a function must not be compiled with this mode in it."""
        if current_function_mode() is self:
            super().__exit__(None, None, None)
            self._is_paused = True

    def resume(self) -> None:
        """Watch again after `pause`."""
        if self._is_paused:
            super().__enter__()
            self._is_paused = False
