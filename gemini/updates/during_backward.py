"""Updating chunks while backward still runs (``GeminiPlugin(update_in_backward=True)``).

A chunk is updated when its gradient is complete, backward reads it no more (`Completion`), and it is not pinned.
`optimizer.step()` updates the rest: chunks of units whose outputs have no part in the loss, and parameters outside of
chunks.

::

    WHOLE --a chunk is updated--> PARTIAL --optimizer.step()--> WHOLE
                                     |
                                     '--backward fails--> TORN --all values are loaded--> WHOLE

The gradients are never all in memory at once. What needs all of them (clipping, a loss scale, accumulation) is refused,
if possible before anything is updated.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from enum import Enum, auto
from typing import Any

from torch import Tensor

from ..chunk import Chunk, ChunkManager
from ..errors import TornStep
from ..torch_private import current_backward
from ..units.units import Visit
from .completion import Completion
from .options import Options, first_change
from .schedule import UpdateSchedule


class Progress(Enum):
    """Whether all parameters are of the same optimizer step."""

    WHOLE = auto()
    """All parameters are of the same step."""
    PARTIAL = auto()
    """Backward has updated some chunks; ``optimizer.step()`` updates the others."""
    TORN = auto()
    """Backward failed after that: some chunks are a step ahead of the others, until all values have been loaded."""


class DuringBackward(UpdateSchedule):
    """Updates each chunk as soon as backward needs it no more.

    Parameters
    ----------
    manager, completion
        The chunks, and when backward needs each of them no more.
    """

    consumes_gradients = watches_units = True

    def __init__(self, manager: ChunkManager, completion: Completion) -> None:
        self.progress = Progress.WHOLE
        self.update_count = 0
        """The number of updates within backwards so far."""
        self._manager = manager
        self._completion = completion
        self._options: list[Mapping[str, Any]] = []
        """The options of the parameter groups when the first chunk of this step was updated."""
        self._updated: set[Chunk] = set()
        self._updates_here = 0
        """The number of chunks that the current backward has updated."""
        self._step = 0
        """The number of the current step."""
        self._missing: set[tuple[int, str]] = set()
        """The id of the parameter and the name of each value that is still to be loaded after a torn step."""

    @property
    def updated_early(self) -> Set[Chunk]:
        return self._updated

    # -- backward

    def backward_begins(self, task: int) -> bool:
        is_outermost = self._completion.is_idle
        is_new = self._completion.begin(task) and is_outermost
        if is_new:
            self._updates_here = 0
        return is_new

    def gradient_arrives(self, chunk: Chunk, position: int) -> None:
        if chunk in self._updated:
            raise TornStep(
                f"a gradient of {chunk.layout.slots[position].name} came after the optimizer had updated it within the "
                "same step; boost without update_in_backward"
            )

    def gradient_arrived(self, chunk: Chunk, position: int) -> Sequence[Chunk]:
        self._completion.arrived(chunk, position, current_backward())
        return self._complete([chunk])

    def unit_called(self, visit: Visit, has_graph: bool, in_backward: bool) -> None:
        self._completion.called(visit, has_graph, in_backward)

    def unit_left(self, visit: Visit) -> Sequence[Chunk]:
        self._completion.left(visit)
        return self._complete(visit.chunks)

    def backward_ended(self, task: int) -> Sequence[Chunk]:
        return self._complete(self._manager.chunks) if self._completion.end(task) else ()

    def backward_failed(self) -> bool:
        # A second backward that was refused has updated nothing: the step can still be completed.
        self._completion.forget()
        if self.progress is Progress.PARTIAL and not self._updates_here:
            return False
        if self.progress is Progress.PARTIAL:
            self.progress = Progress.TORN
            self._missing = {
                (id(binding.parameter), name)
                for chunk in self._manager.chunks
                if chunk.is_trainable
                for binding in chunk.bindings
                for name in chunk.codecs
            }
        self._updated.clear()
        return True

    def _complete(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        return [chunk for chunk in chunks if self._completion.is_complete(chunk)]

    # -- the step

    def updating(self, chunk: Chunk, step: int, options: Options) -> None:
        if self.progress is Progress.WHOLE:
            self._options = options.copied()
        self.progress = Progress.PARTIAL
        self._updated.add(chunk)
        self._updates_here += 1
        self.update_count += 1
        self._step = step

    def before_step(self, options: Options) -> None:
        if self.progress is Progress.TORN:
            raise TornStep(self.torn_text)
        if self.progress is not Progress.PARTIAL:
            return
        now = options.copied()
        if (change := first_change(self._options, now)) is not None:
            index, name = change
            raise ValueError(
                f"{name} of group {index} was {self._options[index].get(name)!r} when backward updated the first "
                f"chunks, and is {now[index][name]!r} now: with update_in_backward=True change options before backward "
                "or after step(); put it back and call step() again"
            )

    def after_step(self) -> None:
        self.progress = Progress.WHOLE
        self._updated.clear()
        self._completion.forget()

    def replaced(self, parameter: Tensor, name: str) -> None:
        if self.progress is Progress.TORN:
            self._missing.discard((id(parameter), name))
            if not self._missing:
                self.progress = Progress.WHOLE

    def follow(self, parameters: Sequence[Tensor]) -> None:
        self._completion.follow(parameters)

    # -- checks while some chunks are updated and others are not

    @property
    def torn_text(self) -> str:
        if self.progress is not Progress.TORN:
            return ""
        return (
            f"backward failed in step {self._step} when the optimizer had updated some chunks within it "
            "(update_in_backward=True), so parameters and optimizer states are of no single step: load a checkpoint, "
            "booster.load_model and booster.load_optimizer, and go on from there"
        )

    def check_whole(self, doing: str) -> None:
        if self.progress is Progress.TORN:
            raise TornStep(self.torn_text)
        if self.progress is Progress.PARTIAL:
            raise ValueError(
                f"cannot {doing} now: with update_in_backward=True backward has updated {len(self._updated)} chunks "
                "already, call optimizer.step() after each backward first (to accumulate gradients, boost without it)"
            )

    def check_dropping(self) -> None:
        if self.progress is Progress.PARTIAL:
            self.check_whole("forget the gradients")

    def check_clipping(self) -> None:
        raise ValueError(
            "gradients cannot be clipped with update_in_backward=True: the optimizer has used most of them before all "
            "are known; boost without it"
        )

    def check_zeroing(self) -> None:
        raise ValueError(
            "gradients cannot be filled with zeros with update_in_backward=True: they are gone, and the next step "
            "would leave out what has no part in its loss; call zero_grad(), or boost without it"
        )

    def check_current(self, user: str, chunks: Collection[Chunk]) -> None:
        stale = next((chunk for chunk in chunks if chunk in self._updated), None)
        if stale is not None:
            raise ValueError(
                f"{user} uses chunk {stale.index} (with {stale.layout.slots[0].name}) when backward has updated it "
                "already (update_in_backward=True). Use parameters after optimizer.step(); where backward itself runs "
                "code that forward did not show, boost without update_in_backward"
            )
