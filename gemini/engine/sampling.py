"""Measuring non-model data at each moment of a cycle that the profile or a timeline asks for."""

from collections.abc import Iterator

from ..activations import ActivationCounts
from ..chunk import ChunkManager, GradientTensors, Tier
from ..memory.non_model import Batch, NonModelProfile
from ..memory.timeline import Point, Timeline
from ..memory.tracker import NonModelMeter, host_headroom
from ..planning.trace import Phase
from ..process_wide import (
    can_keep_freed_memory,
    keep_freed_memory,
    return_freed_memory,
    trim_freed_memory,
    trim_large_holes,
)


class Sampling:
    """Fills the profile of non-model data, and the timelines of those steps that somebody wants to see.

    Parameters
    ----------
    manager
        Has the chunks: what grows with them is no non-model data.
    meter
        Measures.
    activations
        What has become of saved tensors.
    """

    def __init__(self, manager: ChunkManager, meter: NonModelMeter, activations: ActivationCounts) -> None:
        self.meter = meter
        self.profile = NonModelProfile()
        self.timeline = Timeline(manager.ledger)
        self.batch: Batch | None = None
        """Of the cycle under way."""
        self.is_on = False
        """Each moment of the cycle under way is sampled."""
        self._manager = manager
        self._activations = activations
        self._moved_bytes = 0
        """What homes take of RAM more than when the measurement began; less if negative."""
        self._is_recording = False
        """Somebody wants a timeline of this step; cycles that are measured have one in any case."""
        self._gradient_bytes = 0
        """Of gradients in tensors of their own when the moment began."""
        self._returns_memory = False
        """malloc keeps nothing, because of a cycle that is (or was) measured."""

    def homes_moved(self, nbytes: int) -> None:
        """Homes have come into RAM, or left it (negative)."""
        self._moved_bytes += nbytes

    def end_moment(self) -> None:
        """A unit is about to enter, before its chunks move."""
        self._sample()
        self.timeline.close(self.meter.last_bytes)
        if self.profile.is_measuring:
            self.profile.add(self.meter.last_bytes)

    def begin_moment(self, unit: int, phase: Phase) -> None:
        """A unit has entered, and has its chunks."""
        if self._manager.device.is_ram:
            trim_freed_memory()
        self._gradient_bytes = self._held_gradient_bytes()
        self.meter.mark()
        self.timeline.add(unit, phase)

    def begin_backward(self) -> None:
        """Backward is about to run: all activations are there, and a step takes most memory."""
        if self._manager.device.is_ram and not self._returns_memory:
            trim_large_holes()

    def end_cycle(self) -> None:
        """The cycle is complete; what it was measured to take goes into the profile."""
        if self.profile.is_measuring:
            if not self._manager.device.is_ram:
                self._manager.settle()  # however late updates begin, what they take beside their chunks counts
            self._sample()
            self.profile.end(self.meter.last_bytes)
            self.is_on = self._is_recording

    def begin_cycle(self, batch: Batch, is_same_kind: bool) -> None:
        """A cycle begins; ``is_same_kind`` as the one before, with or without gradients."""
        self.batch = batch
        self.profile.begin(batch)
        self.is_on = self.profile.is_measuring or self._is_recording
        self._choose_malloc()
        if not is_same_kind:
            self.timeline.points.clear()  # an evaluation in between is no part of the step

    def record_step(self, is_wanted: bool) -> None:
        """Make a timeline of the next step, or not."""
        self._is_recording = is_wanted
        self.is_on = self.profile.is_measuring or self._is_recording

    def take_timeline(self) -> list[Point]:
        """The moments of the step that ends here; empty for one that was not sampled."""
        if self.timeline.points:
            self._sample()
        return self.timeline.take(self.meter.last_bytes)

    def _sample(self) -> None:
        manager = self._manager
        grown = manager.gradient_pool.blocks_nbytes + manager.full_copies.nbytes + manager.snapshots.nbytes
        # Those that were there when the moment began: what autograd makes within it is its own, the peak may be before.
        self.meter.sample(grown + self._moved_bytes + self._gradient_bytes)
        self._gradient_bytes = self._held_gradient_bytes()

    def _held_gradient_bytes(self) -> int:
        """Bytes of gradients in tensors of their own, those included that an update still reads."""
        held = 0
        for chunk in self._manager.chunks:
            if isinstance(chunk.gradient, GradientTensors):
                is_read = chunk.update is not None and not chunk.update.done()
                held += chunk.gradient.buffer.nbytes if is_read else chunk.gradient.held_nbytes
        return held

    def gradients_to_come_bytes(self) -> int:
        """Bytes that gradients in tensors of their own will take besides those that are there."""
        return sum(gradient.buffer.nbytes - gradient.held_nbytes for gradient in self._gradient_tensors())

    def _gradient_tensors(self) -> Iterator[GradientTensors]:
        for chunk in self._manager.chunks:
            if isinstance(chunk.gradient, GradientTensors):
                yield chunk.gradient

    def _choose_malloc(self) -> None:
        """Have malloc keep nothing while non-model data in RAM are measured, and for as long as RAM is short."""
        if not self._manager.device.is_ram:
            return
        if self.is_on:
            return_freed_memory()
            self._returns_memory = True
        elif self._returns_memory:
            self._returns_memory = False  # asked once, until something is measured again
            away = sum(chunk.full_nbytes for chunk in self._manager.chunks if not chunk.is_resident)
            growth = min(self._manager.ledger.free(Tier.DEVICE), away)
            growth += self.gradients_to_come_bytes()
            # What comes back from a tier below is of other sizes than what left, and was freed by other threads: malloc
            # would keep both. Measured: 830 instead of 390 MiB for 64 layers of 8 MiB each.
            has_left = self._activations.leave_count > 0
            if not has_left and can_keep_freed_memory(host_headroom()[0], growth, self.meter.peak_bytes):
                keep_freed_memory()
