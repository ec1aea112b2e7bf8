"""`Timer` and `MultiTimer`: how long parts of a script take, with what they asked of the device."""

import time
from collections.abc import Iterator

from .accelerator import get_accelerator


class Timer:
    """A stopwatch that waits for the device when it starts and stops. All times are in seconds."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._elapsed = 0.0
        self._history: list[float] = []

    @property
    def has_history(self) -> bool:
        """Whether a time was kept."""
        return bool(self._history)

    def start(self) -> None:
        """Begin to measure."""
        self._started = _now()

    def lap(self) -> float:
        """The time since the start; goes on measuring. Raises as `stop` does."""
        if self._started is None:
            raise RuntimeError("the timer is not running: call start() first")
        return _now() - self._started

    def stop(self, keep_in_history: bool = False) -> float:
        """The time since the start.

        Parameters
        ----------
        keep_in_history
            Keep it for `get_history_sum` and `get_history_mean`.

        Raises
        ------
        RuntimeError
            If the timer is not running.
        """
        self._elapsed = self.lap()
        self._started = None
        if keep_in_history:
            self._history.append(self._elapsed)
        return self._elapsed

    def get_elapsed_time(self) -> float:
        """The time between the last start and stop. RuntimeError while the timer is running."""
        if self._started is not None:
            raise RuntimeError("the timer is running: call stop(), or ask lap()")
        return self._elapsed

    def get_history_sum(self) -> float:
        """All kept times together."""
        return sum(self._history)

    def get_history_mean(self) -> float:
        """The mean of the kept times. ValueError if there are none."""
        if not self._history:
            raise ValueError("no time was kept: call stop(keep_in_history=True)")
        return sum(self._history) / len(self._history)

    def reset(self) -> None:
        """Stop, and forget all times."""
        self._started, self._elapsed, self._history = None, 0.0, []


class MultiTimer:
    """Timers by name.

    Parameters
    ----------
    on
        False: nothing is measured.
    """

    def __init__(self, on: bool = True) -> None:
        self._on = on
        self._timers: dict[str, Timer] = {}

    def start(self, name: str) -> None:
        """Start the timer of this name."""
        if self._on:
            self._timers.setdefault(name, Timer()).start()

    def stop(self, name: str, keep_in_history: bool) -> float | None:
        """Stop the timer of this name; returns its time, or None if nothing is measured."""
        return self._timers[name].stop(keep_in_history) if self._on else None

    def get_timer(self, name: str) -> Timer:
        """The timer of this name."""
        return self._timers[name]

    def reset(self, name: str | None = None) -> None:
        """Reset one timer, or all."""
        for timer in self._timers.values() if name is None else (self._timers[name],):
            timer.reset()

    def is_on(self) -> bool:
        """Whether times are measured."""
        return self._on

    def set_status(self, mode: bool) -> None:
        """Measure from now on, or don't."""
        self._on = mode

    def __iter__(self) -> Iterator[tuple[str, Timer]]:
        return iter(self._timers.items())


def _now() -> float:
    get_accelerator().synchronize()
    return time.perf_counter()
