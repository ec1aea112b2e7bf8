"""Ctrl-C and SIGTERM while training: the first one ends after the step, the second at once."""

from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

from ..signals import signals_to


class Interrupt(ExitStack):
    """Within this context the first signal only asks; ``signal`` says whether and which.

    Parameters
    ----------
    on_request
        Called at the first signal.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        super().__init__()
        self.signal: int | None = None
        self._on_request = on_request

    def __enter__(self) -> "Interrupt":
        self.enter_context(signals_to(self._handle))
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self._on_request()
