"""What a step's non-model data will still take, from what they took so far. Pure.

Before the first step nothing is known of activations. While a forward is measured they are seen to grow, unit by unit,
so that homes can make room before memory runs out: that costs less than a forward that fails.
"""

from dataclasses import dataclass

_GUARD_BYTES = 48 << 20
"""What kernels, threads and malloc may take in one unit besides."""
_BACKWARD = 0.25
"""What backward takes at its peak beyond what the forward has left, relative to that: gradients of activations."""
_LOSS_BYTES = 12
"""For each element of a model's output: the output in fp32, its logarithm of softmax, the gradient of one of them."""
_LEAST_DONE = 0.1
"""Part of a forward whose growth tells of the rest."""
_RISE_SHARE = 8
"""Homes come up where this part (one over it) of the tier would still be free, so that they do not swing."""


@dataclass(slots=True)
class Foresight:
    """Watches non-model data grow in one forward."""

    _done: float = 1.0
    _taken_bytes: int = 0

    def begin(self) -> None:
        """A forward begins."""
        self._done, self._taken_bytes = 1.0, 0

    def lacking(self, done: float, taken_bytes: int, free_bytes: int, room_bytes: int) -> int:
        """Bytes that the rest of the step will lack.

        Parameters
        ----------
        done
            The part of the units that have entered; 1 in backward.
        taken_bytes
            By non-model data.
        free_bytes, room_bytes
            What the process may still take, and how much of it full copies may.
        """
        if done < self._done and done < 1.0 and not self._taken_bytes:
            self._done, self._taken_bytes = done, max(taken_bytes, 1)
        rest = 0.0
        if done - self._done >= _LEAST_DONE:
            growth = max(taken_bytes - self._taken_bytes, 0) / (done - self._done)
            rest = growth * (1.0 - min(done, 1.0) + (_BACKWARD if done < 1.0 else 0.0))
        return max(round(rest) + room_bytes + guard(free_bytes + taken_bytes) - free_bytes, 0)


def lacking_for_backward(taken_bytes: int, loss_numel: int, free_bytes: int, room_bytes: int) -> int:
    """Bytes that the loss and the backward of a forward that is over will lack.

    Parameters
    ----------
    taken_bytes
        By non-model data.
    loss_numel
        Elements of which a loss will be computed, or has been.
    free_bytes, room_bytes
        What the process may still take, and how much of it full copies and gradients need.
    """
    need = round(_BACKWARD * taken_bytes) + _LOSS_BYTES * loss_numel + guard(free_bytes + taken_bytes)
    return max(need + room_bytes - free_bytes, 0)


def guard(total_bytes: int) -> int:
    """What is kept free of a small memory, or of a large one."""
    return min(_GUARD_BYTES, total_bytes // 8)


def capacity_between_steps(capacity: int, most: int, free_bytes: int, room_bytes: int, peak_bytes: int) -> int:
    """What a tier may hold from the next step on.

    Parameters
    ----------
    capacity, most
        What it may hold now, and at most.
    free_bytes
        What the process may still take.
    room_bytes
        How much of that model data may take, as it is.
    peak_bytes
        What non-model data are expected to take.
    """
    spare = free_bytes - room_bytes - peak_bytes - guard(free_bytes)
    if spare < 0:
        return capacity + spare
    rise = min(spare - most // _RISE_SHARE, most - capacity)
    return capacity + rise if rise > most // _RISE_SHARE or (rise > 0 and capacity + rise == most) else capacity
