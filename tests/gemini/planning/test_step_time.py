"""The time of a step by what waits for what: cases that can be worked out by hand, and what holds for all."""

import random
from dataclasses import replace

import pytest

from gemini.planning.step_time import (
    Begin,
    ChunkTraffic,
    DiskRates,
    Order,
    Resource,
    Step,
    Task,
    Urgency,
    Visit,
    schedule,
    step_time,
)

MIB = 1 << 20
DISK = DiskRates(read=float(MIB), write=float(MIB), mixed=float(MIB))
"""A MiB a second, so that seconds are MiB."""


def streamed(mebibytes: int) -> ChunkTraffic:
    return ChunkTraffic(update_read_bytes=mebibytes * MIB // 2, update_written_bytes=mebibytes * MIB // 2)


def step(seconds: list[tuple[float, float]], chunks: list[ChunkTraffic], **order: object) -> Step:
    """Modules with one chunk each; forward and backward seconds."""
    return Step(
        forward=tuple(Visit(chunks=(i,), seconds=f) for i, (f, _) in enumerate(seconds)),
        backward=tuple(Visit(chunks=(i,), seconds=b) for i, (_, b) in reversed(list(enumerate(seconds)))),
        chunks=dict(enumerate(chunks)),
        order=Order(updates=tuple(range(len(chunks))), **order),  # type: ignore[arg-type]
    )


def test_without_traffic_a_step_is_what_it_computes() -> None:
    found = step_time(step([(1.0, 2.0), (3.0, 4.0)], [ChunkTraffic(update_seconds=0.5)] * 2), DISK)
    assert (found.seconds, found.computing_seconds, found.disk_seconds) == (11.0, 11.0, 0.0)
    assert found.waiting_seconds == 0.0


def test_an_update_hides_behind_the_forward_of_what_comes_before_it() -> None:
    # The last module's stream of 4 s runs beside the first one's forward of 5 s; the other way round nothing hides.
    last = step_time(step([(5.0, 5.0), (1.0, 1.0)], [ChunkTraffic(), streamed(4)]), DISK)
    first = step_time(step([(5.0, 5.0), (1.0, 1.0)], [streamed(4), ChunkTraffic()]), DISK)
    assert (last.seconds, first.seconds) == (12.0, 16.0)
    assert (last.waiting_seconds, first.waiting_seconds) == (0.0, 4.0)
    assert last.backward_idle_seconds == first.backward_idle_seconds == 6.0


def test_updates_in_backward_begin_when_gradients_are_complete() -> None:
    model = step([(1.0, 9.0), (1.0, 1.0)], [ChunkTraffic(), streamed(4)], begin=Begin.WHEN_COMPLETE)
    assert step_time(model, DISK).seconds == 12.0
    # What is used first in forward is complete last: it cannot begin before backward ends.
    first = step([(1.0, 9.0), (1.0, 1.0)], [streamed(4), ChunkTraffic()], early=frozenset({0, 1}))
    assert step_time(first, DISK).seconds == 16.0


def test_states_read_ahead_in_backward_leave_the_writing() -> None:
    plain = step([(1.0, 9.0)], [streamed(8)])
    assert step_time(plain, DISK).seconds == 18.0
    assert step_time(replace(plain, order=replace(plain.order, read_ahead_bytes=4 * MIB)), DISK).seconds == 14.0


def test_what_is_needed_first_is_to_be_updated_first() -> None:
    chunks = [streamed(2), streamed(6)]
    model = step([(6.0, 1.0), (1.0, 1.0)], chunks)
    assert step_time(model, DISK).seconds == 11.0
    assert step_time(replace(model, order=Order(updates=(1, 0))), DISK).seconds == 17.0


def test_a_gradient_on_the_disk_is_written_in_backward_and_read_by_the_update() -> None:
    found = step_time(step([(1.0, 1.0), (1.0, 5.0)], [ChunkTraffic(), ChunkTraffic(gradient_bytes=3 * MIB)]), DISK)
    # Backward 6, of which the first gradient is complete after 5; stored until 8, read until 11, one forward beside.
    assert found.seconds == 12.0 and found.disk_seconds == 6.0


def test_full_copies_are_fetched_ahead_of_their_visits() -> None:
    chunks = [ChunkTraffic(fetch_bytes=2 * MIB)] * 3
    model = step([(4.0, 4.0)] * 3, chunks)
    fetched = replace(
        model,
        forward=tuple(replace(visit, fetched=visit.chunks) for visit in model.forward),
        backward=tuple(replace(visit, fetched=visit.chunks) for visit in model.backward[1:]),
    )
    found = step_time(fetched, DISK)
    assert found.disk_seconds == 10.0 and found.seconds == found.computing_seconds + found.waiting_seconds
    slower = step_time(fetched, DiskRates(read=MIB / 8, write=MIB, mixed=MIB))
    assert slower.seconds > found.seconds and slower.seconds >= slower.disk_seconds == 80.0


def test_reading_and_writing_at_once_take_the_mixed_rate() -> None:
    disk = DiskRates(read=1.0, write=4.0, mixed=2.0)
    assert disk.seconds(10, 10) == 10.0
    assert disk.seconds(10, 0) == 10.0
    assert disk.seconds(0, 8) == 2.0
    assert disk.seconds(10, 4) == 4.0 + 6.0


def test_a_resource_takes_the_most_urgent_of_what_may_begin() -> None:
    tasks = [
        Task(Resource.DISK, 1.0, (), Urgency.UPDATE),
        Task(Resource.DISK, 1.0, (), Urgency.UPDATE),
        Task(Resource.COMPUTING, 0.5),
        Task(Resource.DISK, 1.0, (2,), Urgency.FETCH),
    ]
    assert schedule(tasks) == [(0.0, 1.0), (2.0, 3.0), (0.0, 0.5), (1.0, 2.0)]


@pytest.mark.parametrize("seed", range(60))
def test_no_step_takes_less_than_its_computing_or_its_traffic_nor_more_than_both(seed: int) -> None:
    of = random.Random(seed)
    count = of.randint(1, 6)
    chunks = [
        ChunkTraffic(
            fetch_bytes=of.randint(0, 4) * MIB,
            update_read_bytes=of.randint(0, 40) * MIB,
            update_written_bytes=of.randint(0, 40) * MIB,
            gradient_bytes=of.randint(0, 2) * MIB,
            update_seconds=of.random(),
        )
        for _ in range(count)
    ]
    model = step([(of.random() * 20, of.random() * 40) for _ in range(count)], chunks)
    model = replace(
        model,
        forward=tuple(replace(v, fetched=v.chunks if of.random() < 0.5 else ()) for v in model.forward),
        order=Order(
            updates=tuple(of.sample(range(count), count)),
            begin=of.choice(list(Begin)),
            early=frozenset(of.sample(range(count), of.randint(0, count))),
            read_ahead_bytes=of.choice([0, 10 * MIB, 1 << 40]),
            prefetched_visits=of.randint(1, 3),
        ),
        updates_on_computing_cores=of.random() < 0.5,
    )
    disk = DiskRates(read=MIB * of.uniform(0.5, 2), write=MIB * of.uniform(0.5, 2), mixed=MIB * of.uniform(0.5, 2))
    found = step_time(model, disk)
    optimizer = 0.0 if model.updates_on_computing_cores else sum(chunk.update_seconds for chunk in chunks)
    assert found.seconds >= max(found.computing_seconds, found.disk_seconds) - 1e-6
    assert found.seconds <= found.computing_seconds + found.disk_seconds + optimizer + 1e-6


def test_a_step_of_a_terabyte_is_simulated_at_once() -> None:
    chunks = [streamed(1 << 14) for _ in range(64)]
    found = step_time(step([(1.0, 1.0)] * 64, chunks), DISK)
    assert found.disk_seconds == pytest.approx(1 << 20)
