"""A bar for work on files that takes more than two seconds: bytes, rate, and what is left.

On terminals and in notebooks, for the first rank, on the thread that waits for the work; gone when the work is over.
``TQDM_DISABLE=1`` turns it off.
"""

import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

Tell = Callable[[int], None]
"""Is told how many bytes are done."""
DELAY_SECONDS = 2.0
_FORMAT = " {desc} {percentage:3.0f}% |{bar}| {n_fmt} of {total_fmt}  {rate_fmt}  {elapsed} < {remaining} "


def unseen(nbytes: int) -> None:
    """Show nothing."""


class Progress:
    """Shows how many of some bytes are done. A context manager.

    Parameters
    ----------
    doing
        What is done to them, in a word.
    nbytes
        All of them.
    stream
        Where the bar goes; None: standard error.
    """

    def __init__(self, doing: str, nbytes: int, stream: Any = None) -> None:
        self._bar = _bar(doing, nbytes, sys.stderr if stream is None else stream)
        self._begun = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def part(self, nbytes: int) -> Tell:
        """Begin with the next ``nbytes``; what comes back is to be told how many of these are done."""
        before, self._begun = self._begun, self._begun + nbytes

        def tell(done: int) -> None:
            if self._bar is not None:
                self._bar.update(before + done - self._bar.n)

        return tell


def _bar(doing: str, nbytes: int, stream: Any) -> Any:
    if os.environ.get("TQDM_DISABLE") or threading.current_thread() is not threading.main_thread():
        return None
    if dist.is_available() and dist.is_initialized() and dist.get_rank():
        return None
    in_notebook = "ipykernel" in sys.modules
    if not in_notebook and not (hasattr(stream, "isatty") and stream.isatty()):
        return None
    if in_notebook:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no thread that looks after it

    return Bar(
        total=nbytes, desc=doing, unit="B", unit_scale=True, unit_divisor=1024, delay=DELAY_SECONDS, leave=False,
        dynamic_ncols=True, bar_format=None if in_notebook else _FORMAT, file=None if in_notebook else stream,
    )  # fmt: skip
