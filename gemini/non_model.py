"""What non-model data (activations, temporaries) took at each moment, and which batches have to be measured. Pure."""

from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True, slots=True)
class Batch:
    """What is known of a cycle before it runs."""

    with_gradients: bool
    shapes: tuple[tuple[int, ...], ...]
    """Of the model's input tensors."""

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
    """By whether there are gradients."""
    _batch: Batch | None = None
    _moments: list[int] = field(default_factory=list)

    @property
    def is_measuring(self) -> bool:
        return self._batch is not None

    def begin(self, batch: Batch) -> None:
        """A cycle begins; what the one before had measured is dropped if `end` has not been called."""
        known = self.heaviest.get(batch.with_gradients)
        self._batch = batch if known is None or batch.weight > known.batch.weight else None
        self._moments.clear()

    def add(self, nbytes: int) -> None:
        """The moment before has ended, and took so much at its peak."""
        self._moments.append(nbytes)

    def end(self) -> Measured | None:
        """The cycle is complete; what was measured, if it was."""
        if self._batch is None or not self._moments:
            return None
        measured = self.heaviest[self._batch.with_gradients] = Measured(self._batch, tuple(self._moments))
        self._batch = None
        return measured

    def expected_peak_bytes(self, batch: Batch) -> int | None:
        """What a cycle will take: what was measured, in proportion for a batch of more elements; None if unknown."""
        known = self.heaviest.get(batch.with_gradients)
        if known is None:
            return None
        if batch.numel <= known.batch.numel:
            return known.peak_bytes
        return known.peak_bytes * batch.numel // max(known.batch.numel, 1)
