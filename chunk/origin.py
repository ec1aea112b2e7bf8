"""The process that something was made in: a forked child has its memory, but none of its threads."""

import os

from gemini.errors import ForkError


class Origin:
    """Remembers the process of its construction."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """True in the process of its construction."""
        return os.getpid() == self._pid

    def refuse_elsewhere(self) -> None:
        """Raise in any other process than the one that this was made in.

        Raises
        ------
        ForkError
            In a forked child, where waiting for a thread of the parent never ends.
        """
        if not self.is_here:
            raise ForkError(
                f"a boosted model is used in process {os.getpid()}, a fork of process {self._pid} in which it was "
                "boosted: the threads that move and update its chunks stayed there. Use it in the process that boosted "
                "it (DataLoader(num_workers=0)), give workers plain tensors that were made before the fork "
                "(model.state_dict()), or boost a model of its own in each worker"
            )
