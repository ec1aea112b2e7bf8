"""When a chunk is updated: in ``optimizer.step()``, or as soon as backward has its gradient."""

from collections.abc import Collection, Sequence, Set

from torch import Tensor

from ..chunk import Chunk
from ..units.units import Visit
from .options import Options


class UpdateSchedule:
    """Is told what happens in a training step, and refuses what the schedule does not allow; by itself nothing.

    It starts nothing: methods that return chunks name those whose gradient is complete, and which are to be updated
    now.
    """

    consumes_gradients = False
    """True if gradients are used up before all are known. Then no chunk may be used without a unit that brackets it."""

    @property
    def updated_early(self) -> Set[Chunk]:
        """Chunks already updated in the step under way; reading them would mix two steps."""
        return frozenset()

    # -- backward

    def backward_begins(self, task: int) -> bool:
        """A backward (or one within it) comes to its first node; True if it is a new, outermost one."""
        return False

    def gradient_arrives(self, chunk: Chunk, position: int) -> None:
        """A gradient is about to go into its chunk. Raises if the chunk has been updated already."""

    def gradient_arrived(self, chunk: Chunk, position: int) -> Sequence[Chunk]:
        """A gradient is in its chunk."""
        return ()

    def unit_called(self, visit: Visit, has_graph: bool, in_backward: bool) -> None:
        """A unit's forward is over, within a forward that makes a graph or within backward."""

    def unit_left(self, visit: Visit) -> Sequence[Chunk]:
        """Backward has run every node of a call of a unit."""
        return ()

    def backward_ended(self, task: int) -> Sequence[Chunk]:
        """A backward is over, and the calls that it kept open are left."""
        return ()

    def backward_failed(self) -> bool:
        """A backward did not come to its end; True if the gradients in the chunks are to be dropped."""
        return True

    # -- the step

    def updating(self, chunk: Chunk, step: int, options: Options) -> None:
        """The update of a chunk that one of the methods above returned is about to start: which step, which options."""

    def before_step(self, options: Options) -> None:
        """The optimizer's step begins. Raises if it cannot complete what backward has begun."""

    def after_step(self) -> None:
        """Every parameter has taken the step."""

    def replaced(self, parameter: Tensor, name: str) -> None:
        """A value or a state of a parameter has been loaded."""

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Expect gradients of these parameters, too."""

    # -- what may not happen between two updates of one step

    @property
    def torn_text(self) -> str:
        """What to say of values that are of no single step; empty if they are of one."""
        return ""

    def check_whole(self, doing: str) -> None:
        """Raise if some chunks have taken a step that the others have not; ``doing`` says what is asked for."""

    def check_dropping(self) -> None:
        """Raise if gradients that are to be forgotten have been used."""

    def check_clipping(self) -> None:
        """Raise if the gradients are never there together."""

    def check_zeroing(self) -> None:
        """Raise if gradients have no memory that could be filled with zeros."""

    def check_current(self, user: str, chunks: Collection[Chunk]) -> None:
        """Raise if one of these chunks has been updated early; ``user`` is about to use them."""


class AfterBackward(UpdateSchedule):
    """All chunks are updated in ``optimizer.step()``: nothing before it is refused."""
