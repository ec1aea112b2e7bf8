"""How long a step takes whose model data stream from a disk: what waits for what, simulated. Pure: no torch, no clock.

::

    computing   | forward 0 | forward 1 |  ...  | backward 1 | backward 0 |
                  ^ waits for the update of its chunks            | gradients of a chunk are complete
    disk          | update 0 | update 1 | fetch | ...             v
                  ^ begins at the step, or when its gradients are complete

Steps follow each other; an update may reach into the next forward, which waits for it chunk by chunk. A resource does
one thing at a time, of what may begin the most urgent one, then what was asked first (list scheduling; Graham, 1966).
The order is data, so that other orders and other placements can be compared without training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from heapq import heappop, heappush

PIECE_BYTES = 16 << 20
MOST_PIECES = 1000
"""Of all updates of a step: the simulation of a large model takes no longer than that of a small one."""
STEPS = 4
"""Simulated. The last one, which begins as it ends, is the answer."""


class Resource(Enum):
    """What does one thing at a time."""

    COMPUTING = "computing"
    DISK = "disk"
    OPTIMIZER = "optimizer"


class Urgency(IntEnum):
    """Of two things that may begin, the lower one does."""

    FETCH = 0
    """Somebody waits, or will soon."""
    STORE = 1
    """A gradient's memory is needed again."""
    UPDATE = 2
    READ_AHEAD = 3


class Begin(Enum):
    """When an update may begin."""

    AT_STEP = "at step"
    """When backward is over."""
    WHEN_COMPLETE = "when complete"
    """When backward has run the last visit that uses the chunk."""


@dataclass(frozen=True, slots=True)
class Task:
    """Something that a resource does."""

    resource: Resource
    seconds: float
    after: tuple[int, ...] = ()
    """Indices of tasks that end before it begins."""
    urgency: Urgency = Urgency.FETCH


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Bytes a second."""

    read: float
    write: float
    mixed: float
    """Reading and writing at once, both together."""

    def seconds(self, read_bytes: float, written_bytes: float) -> float:
        """Time to read and write; as much of one as there is of the other at once."""
        both = min(read_bytes, written_bytes)
        return 2 * both / self.mixed + (read_bytes - both) / self.read + (written_bytes - both) / self.write


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTraffic:
    """What one chunk has the disk and the optimizer do."""

    fetch_bytes: int = 0
    """Read for each full copy that is made."""
    update_read_bytes: int = 0
    """Masters and states; they are there at any time."""
    update_written_bytes: int = 0
    gradient_bytes: int = 0
    """Written when it is complete, and read by the update."""
    update_seconds: float = 0.0
    """Computing the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A module computes, in forward or in backward."""

    chunks: tuple[int, ...]
    seconds: float
    fetched: tuple[int, ...] = ()
    """Of these chunks, those whose full copy has to be made for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is done when, as far as it can be chosen."""

    updates: tuple[int, ...]
    """Chunks, in the order of their updates."""
    begin: Begin = Begin.AT_STEP
    early: frozenset[int] = frozenset()
    """Chunks whose updates begin when they are complete, whatever holds for the others."""
    read_ahead_bytes: int = 0
    """Bytes that updates need and that are read in backward already, in the order of the updates."""
    prefetched_visits: int = 1
    """A full copy is asked for when there are as many visits before the one that needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of many alike."""

    forward: tuple[Visit, ...]
    backward: tuple[Visit, ...]
    chunks: Mapping[int, ChunkTraffic]
    order: Order
    updates_on_computing_cores: bool = True
    """False: units compute on an accelerator, and the CPU updates beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A step in the long run."""

    seconds: float
    """From the end of a backward to the end of the next one."""
    computing_seconds: float
    """Of it, what is computed: the step takes no less."""
    disk_seconds: float
    """Of it, what the disk is busy: the step takes no less."""
    waiting_seconds: float
    """Of it, what computing stands still."""
    backward_idle_seconds: float
    """Of backward, what the disk stands still: room for what begins too late."""


def step_time(step: Step, disk: DiskRates) -> StepTime:
    """Simulate steps until they repeat."""
    built = _Building(step, disk)
    ends = [built.add_step() for _ in range(STEPS)]
    times = schedule(built.tasks)
    last = range(ends[-2].first_task, len(built.tasks))
    seconds = times[ends[-1].last_backward][1] - times[ends[-2].last_backward][1]

    def busy(resource: Resource) -> float:
        return sum(built.tasks[i].seconds for i in built.of_step if built.tasks[i].resource is resource)

    computing = busy(Resource.COMPUTING)
    begin, end = times[ends[-1].first_backward][0], times[ends[-1].last_backward][1]
    in_backward = sum(
        max(0.0, min(times[i][1], end) - max(times[i][0], begin))
        for i in last
        if built.tasks[i].resource is Resource.DISK
    )
    return StepTime(
        seconds=seconds,
        computing_seconds=computing,
        disk_seconds=busy(Resource.DISK),
        waiting_seconds=max(0.0, seconds - computing),
        backward_idle_seconds=max(0.0, end - begin - in_backward),
    )


def schedule(tasks: Sequence[Task]) -> list[tuple[float, float]]:
    """When each task begins and ends.

    Parameters
    ----------
    tasks
        Each after those that it waits for.
    """
    left = [len(task.after) for task in tasks]
    followers: list[list[int]] = [[] for _ in tasks]
    for index, task in enumerate(tasks):
        for other in task.after:
            followers[other].append(index)
    ready: dict[Resource, list[tuple[Urgency, int]]] = {resource: [] for resource in Resource}
    times = [(0.0, 0.0)] * len(tasks)
    running: list[tuple[float, int]] = []
    busy: set[Resource] = set()

    def start(now: float) -> None:
        for resource, waiting in ready.items():
            if waiting and resource not in busy:
                _, index = heappop(waiting)
                busy.add(resource)
                times[index] = (now, now + tasks[index].seconds)
                heappush(running, (times[index][1], index))

    for index, task in enumerate(tasks):
        if not task.after:
            heappush(ready[task.resource], (task.urgency, index))
    start(0.0)
    while running:
        now, index = heappop(running)
        busy.remove(tasks[index].resource)
        for follower in followers[index]:
            left[follower] -= 1
            if not left[follower]:
                heappush(ready[tasks[follower].resource], (tasks[follower].urgency, follower))
        start(now)
    return times


@dataclass(frozen=True, slots=True)
class _Ends:
    """Where a step lies among the tasks."""

    first_task: int
    first_backward: int
    last_backward: int


class _Building:
    """Tasks of steps that follow each other."""

    def __init__(self, step: Step, disk: DiskRates) -> None:
        self.tasks: list[Task] = []
        self.of_step = range(0)
        """The tasks of the step added last."""
        self._step = step
        self._disk = disk
        self._updated: dict[int, tuple[int, ...]] = {}
        """Chunk -> what ends with its last update."""
        self._last: tuple[int, ...] = ()
        """The visit before."""
        moved = sum(c.update_read_bytes + c.update_written_bytes for c in step.chunks.values())
        self._piece_bytes = max(PIECE_BYTES, moved // MOST_PIECES)
        on_cores = step.updates_on_computing_cores
        self._updates_on = Resource.COMPUTING if on_cores else Resource.OPTIMIZER

    def add_step(self) -> _Ends:
        step, first = self._step, len(self.tasks)
        self._visit_all(step.forward)
        backward_begins = self._last
        visited = self._visit_all(step.backward)
        complete = {chunk: (visit,) for visit, at in zip(visited, step.backward, strict=True) for chunk in at.chunks}
        at_step = (visited[-1],)
        ahead = step.order.read_ahead_bytes
        for chunk in step.order.updates:
            last_use = complete.get(chunk, at_step)
            is_early = chunk in step.order.early or step.order.begin is Begin.WHEN_COMPLETE
            begins = last_use if is_early else at_step
            ahead = self._update(chunk, begins, last_use, backward_begins, ahead)
        self.of_step = range(first, len(self.tasks))
        return _Ends(first, visited[0], visited[-1])

    def _add(self, task: Task) -> int:
        self.tasks.append(task)
        return len(self.tasks) - 1

    def _visit_all(self, visits: Sequence[Visit]) -> list[int]:
        done: list[int] = []
        before = self._last
        for number, visit in enumerate(visits):
            waits = [*self._last]
            for chunk in visit.chunks:
                waits.extend(self._updated.get(chunk, ()))
            asked = number - self._step.order.prefetched_visits
            asked_after = (done[asked],) if asked >= 0 else before
            for chunk in visit.fetched:
                seconds = self._disk.seconds(self._step.chunks[chunk].fetch_bytes, 0)
                if seconds:
                    after = (*asked_after, *self._updated.get(chunk, ()))
                    waits.append(self._add(Task(Resource.DISK, seconds, after, Urgency.FETCH)))
            done.append(self._add(Task(Resource.COMPUTING, visit.seconds, tuple(dict.fromkeys(waits)))))
            self._last = (done[-1],)
        return done

    def _update(
        self, chunk: int, begins: tuple[int, ...], complete: tuple[int, ...], backward: tuple[int, ...], ahead: int
    ) -> int:
        """The update of one chunk, in pieces; the bytes that those that follow may still read ahead."""
        traffic, disk = self._step.chunks[chunk], self._disk
        if traffic.gradient_bytes:
            store = Task(Resource.DISK, disk.seconds(0, traffic.gradient_bytes), complete, Urgency.STORE)
            begins = (*begins, self._add(store))
        moved = traffic.update_read_bytes + traffic.update_written_bytes
        pieces = max(1, -(-moved // self._piece_bytes))
        states, gradient = traffic.update_read_bytes / pieces, traffic.gradient_bytes / pieces
        done: list[int] = []
        for _ in range(pieces):
            after, to_read = begins, states
            if 0 < states <= ahead:
                ahead -= round(states)
                earlier = Task(Resource.DISK, disk.seconds(states, 0), backward, Urgency.READ_AHEAD)
                after, to_read = (*begins, self._add(earlier)), 0.0
            if seconds := disk.seconds(to_read + gradient, traffic.update_written_bytes / pieces):
                after = (self._add(Task(Resource.DISK, seconds, after, Urgency.UPDATE)),)
            if traffic.update_seconds:
                computed = Task(self._updates_on, traffic.update_seconds / pieces, after, Urgency.UPDATE)
                after = (self._add(computed),)
            done.extend(after)
        self._updated[chunk] = tuple(dict.fromkeys(done))
        return ahead
