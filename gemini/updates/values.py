"""Values of parameters and optimizer states, as users read and replace them: never those of two steps."""

from torch import Tensor

from ..chunk import (
    ChunkManager,
    SlotValues,
    accept_replaced,
    open_to_replace,
    open_values,
    read_own_part,
    write_own_part,
)
from .schedule import UpdateSchedule


class Values:
    """Reads and replaces what chunks hold, where the schedule of updates allows it.

    Parameters
    ----------
    manager, schedule
        Has the values, and knows whether they are of one step.
    """

    def __init__(self, manager: ChunkManager, schedule: UpdateSchedule) -> None:
        self.manager = manager
        self._schedule = schedule

    def check_readable(self) -> None:
        """Raise if the values are of no single step."""
        self._schedule.check_whole("read parameters or optimizer states")

    def read(self, parameter: Tensor, name: str) -> Tensor:
        """See `ChunkManager.read`; on the thread that reads a snapshot, the values of that."""
        if (snapshot := self.manager.snapshots.of_reader) is not None:
            place = self.manager.find(parameter)
            assert place is not None
            return snapshot.read(*place, name)
        self.check_readable()
        return self.manager.read(parameter, name)

    def open(self, parameter: Tensor, name: str) -> SlotValues | None:
        """See `open_values`; None on the thread that reads a snapshot."""
        if self.manager.snapshots.of_reader is not None:
            return None
        self.check_readable()
        return open_values(self.manager, parameter, name)

    def open_to_replace(self, parameter: Tensor, name: str) -> SlotValues | None:
        """See `gemini.chunk.open_to_replace`; `replaced` has to be called afterwards."""
        return open_to_replace(self.manager, parameter, name)

    def replaced(self, parameter: Tensor, name: str) -> None:
        """Values have been replaced by means of `open_to_replace`."""
        accept_replaced(self.manager, parameter, name)
        self._schedule.replaced(parameter, name)

    def write(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """See `ChunkManager.write`."""
        self.manager.write(parameter, name, value)
        self._schedule.replaced(parameter, name)

    def read_own(self, parameter: Tensor, name: str) -> Tensor:
        """See `read_own_part`."""
        self.check_readable()
        return read_own_part(self.manager, parameter, name)

    def write_own(self, parameter: Tensor, name: str, values: Tensor) -> None:
        """See `write_own_part`."""
        write_own_part(self.manager, parameter, name, values)
        self._schedule.replaced(parameter, name)
