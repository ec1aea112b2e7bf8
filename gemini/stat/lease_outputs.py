"""What ``gemini-stat lease --json`` prints."""

from typing import Annotated

from gemini.stat.outputs import Output
from gemini.telemetry.records import Natural
from gemini.telemetry.statistics import doc


class LeasedMemory(Output):
    """What a lease has of one memory."""

    held_bytes: Annotated[Natural, doc("Promised to it.")]
    used_bytes: Annotated[Natural, doc("What its model data take.")]
    floor_bytes: Annotated[Natural, doc("What it needs at least, or its user has said.")]
    wish_bytes: Annotated[Natural, doc("What it can make use of.")]


class LeaseState(Output):
    """What one process holds, or one budget of it."""

    lease: str
    job: Annotated[str, doc("The same for all ranks of a training.")]
    program: str
    pid: Natural
    rank: Natural
    ranks: Annotated[Natural, doc("Of the training on this machine.")]
    started_at: float
    is_waiting: Annotated[bool, doc("It waits for what others give back.")]
    memories: Annotated[dict[str, LeasedMemory], doc("By host, device, disk.")]


class SharedMemory(Output):
    """A limit, and the leases under it."""

    memory: str
    name: str
    total_bytes: Natural
    free_bytes: Natural
    promised_bytes: Annotated[Natural, doc("To all leases together.")]
    left_bytes: Annotated[Natural, doc("Free and promised to nobody.")]
    leases: list[str]


class MachineState(Output):
    """Who holds what, what is promised, what is free."""

    memories: list[SharedMemory]
    leases: list[LeaseState]


class LeaseAnswer(Output):
    """What became of something that was asked of a run."""

    is_done: bool
    text: str
    lease: str
    pid: Natural
