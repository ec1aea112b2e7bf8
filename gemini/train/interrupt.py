"""Ctrl-C and SIGTERM while training: the first one ends after the step, the second at once."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Within this context the first signal only asks; ``signal`` says whether and which.

    Parameters
    ----------
    on_request
        Called at the first signal.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.signal: int | None = None
        self._on_request = on_request
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: whoever started us handles signals
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self._on_request()
