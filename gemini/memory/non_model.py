"""Bytes of non-model data (activations, temporaries) at each moment, and batches that have to be measured. Pure."""

from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of a cycle, known before it runs."""

    with_gradients: bool
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the model's input tensors."""

    @property
    def numel(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    @property
    def weight(self) -> int:
        """Grows with anything that activations may grow with: elements, and the square of a sequence's length."""
        return sum(prod(shape) * max(shape, default=1) for shape in self.shapes)


@dataclass(frozen=True, slots=True)
class Measured:
    """One cycle that was measured."""

    batch: Batch
    moments: tuple[int, ...]
    """Peak bytes from each moment to the next, the last one to the end of the cycle."""

    @property
    def peak_bytes(self) -> int:
        return max(self.moments, default=0)


@dataclass(slots=True)
class NonModelProfile:
    """Has a cycle measured if its batch is heavier than any measured before.

    Lighter ones take the numbers of heavier ones: sampling costs system calls at every moment, and batches of text
    have another length at every step.
    """

    heaviest: dict[bool, Measured] = field(default_factory=dict)
    """The heaviest measured cycle with gradients (True) and without (False)."""
    _batch: Batch | None = None
    _moments: list[int] | None = None
    """None until the first moment begins."""

    @property
    def is_measuring(self) -> bool:
        return self._batch is not None

    def begin(self, batch: Batch) -> None:
        """A cycle begins; what the one before had measured is dropped if `end` has not been called."""
        known = self.heaviest.get(batch.with_gradients)
        self._batch = batch if known is None or batch.weight > known.batch.weight else None
        self._moments = None

    def add(self, nbytes: int) -> None:
        """A moment begins; ``nbytes`` is the peak of the one before, which at the first is no part of the cycle."""
        if self._moments is None:
            self._moments = []
        else:
            self._moments.append(nbytes)

    def end(self, nbytes: int) -> None:
        """The cycle is complete; ``nbytes`` is the peak of its last moment."""
        if self._batch is not None and self._moments is not None:
            self.heaviest[self._batch.with_gradients] = Measured(self._batch, (*self._moments, nbytes))
        self._batch = None

    def forget_training(self) -> None:
        """Cycles with gradients have another graph from now on."""
        self.heaviest.pop(True, None)

    def expected_peak_bytes(self, batch: Batch) -> int | None:
        """The measured peak, in proportion for a batch of more elements; None if nothing was measured."""
        known = self.heaviest.get(batch.with_gradients)
        if known is None:
            return None
        if batch.numel <= known.batch.numel:
            return known.peak_bytes
        return known.peak_bytes * batch.numel // max(known.batch.numel, 1)
