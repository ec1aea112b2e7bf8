"""When chunks are updated: in ``optimizer.step()``, or within backward."""

from collections.abc import Collection, Sequence, Set

from torch import Tensor

from ..chunk import Chunk
from ..torch_private import current_backward
from ..units.units import Visit
from .completion import Completion
from .options import Options


class UpdateSchedule:
    """Receives the events of a training step, and returns the chunks to update now. The base allows everything.

    It starts no update itself. The ``check`` methods raise if the schedule does not allow an operation now.
    """

    consumes_gradients = False
    """True if updates consume gradients before backward ends. Then chunks may be used within units only."""

    watches_units = False
    """True if it has to hear of each unit's end, in forward and in backward."""

    @property
    def updated_early(self) -> Set[Chunk]:
        """Chunks already updated in the current step: their values are one step ahead of the others."""
        return frozenset()

    def forward_begins(self) -> None:
        """The model's forward begins, outside of any backward."""

    # -- backward

    def backward_begins(self, task: int) -> bool:
        """A backward, maybe nested in another, runs its first node; True if it is a new, outermost one."""
        return False

    def gradient_arrives(self, chunk: Chunk, position: int) -> None:
        """A gradient is about to be accumulated into its chunk. Raises if the chunk has been updated already."""

    def gradient_arrived(self, chunk: Chunk, position: int) -> Sequence[Chunk]:
        """A gradient has been accumulated into its chunk; returns the chunks to update now, as do the others below."""
        return ()

    def unit_called(self, visit: Visit, has_graph: bool, in_backward: bool) -> None:
        """A unit's forward has ended, in a training forward or within backward."""

    def unit_left(self, visit: Visit) -> Sequence[Chunk]:
        """Backward has run all nodes of a call of a unit."""
        return ()

    def backward_ended(self, task: int) -> Sequence[Chunk]:
        """A backward has ended, and all of its calls of units have been left."""
        return ()

    def backward_failed(self) -> bool:
        """A backward raised; True if the gradients in the chunks are to be dropped."""
        return True

    # -- the step

    def updating(self, chunk: Chunk, step: int, options: Options) -> None:
        """The update of a chunk that a method above returned is about to start, in this step and with these options."""

    def before_step(self, options: Options) -> None:
        """``optimizer.step()`` begins. Raises if it cannot complete the step that backward has begun."""

    def after_step(self) -> None:
        """``optimizer.step()`` has updated all parameters."""

    def replaced(self, parameter: Tensor, name: str) -> None:
        """A value of a parameter, or one of its states, has been loaded."""

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Track the gradients of these parameters, too."""

    # -- checks while some chunks are updated and others are not

    @property
    def torn_text(self) -> str:
        """The error message after a torn step; empty if the values are of one step."""
        return ""

    def check_whole(self, doing: str) -> None:
        """Raise if some chunks are a step ahead of the others. ``doing`` names the operation in the message."""

    def check_dropping(self) -> None:
        """Raise if some gradients have been consumed, so that they cannot all be dropped."""

    def check_clipping(self) -> None:
        """Raise if the gradients are never all in memory at once."""

    def check_zeroing(self) -> None:
        """Raise if gradients have no memory that could be filled with zeros."""

    def check_current(self, user: str, chunks: Collection[Chunk]) -> None:
        """Raise if one of these chunks has been updated in the current step. ``user`` names the code that uses them."""


class AfterBackward(UpdateSchedule):
    """Updates all chunks in ``optimizer.step()``; refuses nothing."""


class WhenComplete(AfterBackward):
    """As `AfterBackward`, and names the chunks whose updates could begin before that.

    Parameters
    ----------
    completion
        When backward needs each chunk no more.
    """

    watches_units = True

    def __init__(self, completion: Completion) -> None:
        self._completion = completion

    def forward_begins(self) -> None:
        # Calls whose backward never comes would gather. If it does come, its gradients are seen to come late.
        self._completion.forget()

    def backward_begins(self, task: int) -> bool:
        is_outermost = self._completion.is_idle
        return self._completion.begin(task) and is_outermost

    def gradient_arrived(self, chunk: Chunk, position: int) -> Sequence[Chunk]:
        self._completion.arrived(chunk, position, current_backward())
        return self._complete([chunk])

    def unit_called(self, visit: Visit, has_graph: bool, in_backward: bool) -> None:
        self._completion.called(visit, has_graph, in_backward)

    def unit_left(self, visit: Visit) -> Sequence[Chunk]:
        self._completion.left(visit)
        return self._complete(visit.chunks)

    def backward_ended(self, task: int) -> Sequence[Chunk]:
        self._completion.end(task)
        return ()  # the step comes next

    def backward_failed(self) -> bool:
        self._completion.forget()
        return True

    def after_step(self) -> None:
        self._completion.forget()

    def follow(self, parameters: Sequence[Tensor]) -> None:
        self._completion.follow(parameters)

    def _complete(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        return [chunk for chunk in chunks if self._completion.is_complete(chunk)]
