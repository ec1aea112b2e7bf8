"""The background optimizer: exact, in order, and all or nothing when the disk fails."""

import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import pytest
import torch
from torch import Tensor

from gemini.chunk import (
    Buffer,
    Chunk,
    ChunkLayout,
    DiskBackend,
    GradientBuffer,
    Ledger,
    MemoryBuffer,
    RamBackend,
    Role,
    Staging,
    TensorSpec,
    Tier,
    pack,
    workers,
)
from gemini.errors import OffloadError
from gemini.nn.optimizer.adam_rule import AdamAtStep
from gemini.nn.optimizer.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.rule import AtStep
from gemini.nn.optimizer.update import adam_update
from gemini.updates.update_queue import BLOCK_SETS, ChunkUpdate, Run, Ticket, UpdateQueue, update_roles

pytestmark = pytest.mark.timeout(60)

BLOCK_NUMEL = 64
UPDATE_ROLES = update_roles(2)
HYPER = AdamHyper(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, decoupled=True, bias_correction=True)
ON_DISK = dict.fromkeys(UPDATE_ROLES, Tier.DISK)
IN_RAM = dict.fromkeys(UPDATE_ROLES, Tier.HOST)
MIXED = {**ON_DISK, Role.MASTER: Tier.HOST, Role.GRADIENT: Tier.HOST}


class Faults:
    """Makes the calls with these numbers (counted from 0 over all buffers and threads) fail."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = set(numbers)
        self.always = False
        self.calls = 0
        self._lock = Lock()

    def check(self) -> None:
        with self._lock:
            number, self.calls = self.calls, self.calls + 1
            if self.always or number in self.numbers:
                raise OffloadError(5, f"call {number} fails")


class FaultyBuffer:
    """A disk home whose reads and writes may fail."""

    tier = Tier.DISK
    tensor: Tensor | None = None

    def __init__(self, buffer: Buffer, faults: Faults) -> None:
        self.numel, self.dtype, self.nbytes = buffer.numel, buffer.dtype, buffer.nbytes
        self._buffer, self._faults = buffer, faults

    def read(self, start: int, out: Tensor) -> None:
        self._faults.check()
        self._buffer.read(start, out)

    def write(self, start: int, source: Tensor) -> None:
        if start % 3:  # a write that fails may have changed any part of its range
            self._buffer.write(start, torch.full_like(source, float("nan")))
        self._faults.check()
        self._buffer.write(start, source)


@dataclass
class Rig:
    """Chunks with random values, a queue, and what the values should become."""

    chunks: list[Chunk]
    queue: UpdateQueue
    faults: Faults
    expected: list[dict[Role, Tensor]]
    steps: int = 0

    def submit(self, *indices: int) -> list[Ticket]:
        """One step of these chunks (of all, by default); `expected` follows."""
        self.steps += 1
        at_step = scalars(HYPER, self.steps, grad_scale=0.5)
        updates = []
        for index in indices or range(len(self.chunks)):
            chunk, expected = self.chunks[index], self.expected[index]
            runs = runs_of(chunk.layout, AdamAtStep(at_step))
            for run in runs:
                adam_update(*(expected[role][run.start : run.stop] for role in UPDATE_ROLES), at_step)
            updates.append(ChunkUpdate(chunk, runs, None))
        return self.queue.submit(updates)

    def check(self) -> None:
        for chunk, expected in zip(self.chunks, self.expected, strict=True):
            for role in UPDATE_ROLES:
                assert torch.equal(content(chunk, role), expected[role]), (chunk.index, role)


def runs_of(layout: ChunkLayout, at_step: AtStep) -> tuple[Run, ...]:
    """All slots but those whose key is a multiple of 5, which have no gradient in this step."""
    return tuple(Run(slot.offset, slot.stop, at_step) for slot in layout.slots if slot.key % 5)


def home(chunk: Chunk, role: Role) -> Buffer:
    assert chunk.gradient is not None
    return chunk.gradient.buffer if role is Role.GRADIENT else chunk.homes[role]


def content(chunk: Chunk, role: Role) -> Tensor:
    buffer = home(chunk, role)
    out = torch.empty(buffer.numel, dtype=buffer.dtype)
    (buffer._buffer if isinstance(buffer, FaultyBuffer) else buffer).read(0, out)
    return out


@contextmanager
def rig(
    folder: Path, places: Sequence[dict[Role, Tier]], faults: Faults, tensors: int = 6, numel: int = 50
) -> Iterator[Rig]:
    generator = torch.Generator().manual_seed(0)
    ledger = Ledger(dict.fromkeys(Tier, 1 << 24), unified=False)
    disk, device = DiskBackend(folder, ledger), RamBackend(None)
    layouts = pack([TensorSpec("w", (numel,), (1,), i) for i in range(len(places)) for _ in range(tensors)], 1 << 20)
    chunks, expected = [], []
    for layout, tiers in zip(layouts, places, strict=True):
        buffers: dict[Role, Buffer] = {}
        values = {}
        for role in UPDATE_ROLES:
            dtype = torch.bfloat16 if role is Role.GRADIENT else torch.float32
            value = torch.randn(layout.numel, generator=generator).abs().to(dtype)
            values[role] = value.clone()
            if tiers[role] is Tier.DISK:
                buffer = disk.allocate(layout.numel, dtype, "test")
                buffer.write(0, value)
                buffers[role] = FaultyBuffer(buffer, faults)
            else:
                buffers[role] = MemoryBuffer(Tier.HOST, value)
        gradient = GradientBuffer(layout, buffers.pop(Role.GRADIENT), device)
        chunk = Chunk(layout, buffers, torch.empty(layout.numel, dtype=torch.bfloat16), full_is_home=False)
        chunk.gradient = gradient
        chunks.append(chunk)
        expected.append(values)
    queue = UpdateQueue(Staging(BLOCK_SETS * len(UPDATE_ROLES), BLOCK_NUMEL))
    try:
        yield Rig(chunks, queue, faults, expected)
    finally:
        queue.close()
        device.close()
        disk.close()


def wait_for_all(tickets: Sequence[Ticket]) -> list[BaseException]:
    """Wait until each is over, trying again as often as needed; the errors on the way."""
    errors: list[BaseException] = []
    for ticket in tickets:
        while True:
            try:
                ticket.wait()
                break
            except OffloadError as error:
                errors.append(error)
    return errors


PLACES = {"disk": [ON_DISK] * 3, "mixed": [MIXED, ON_DISK, IN_RAM], "ram": [IN_RAM] * 3}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_several_steps_give_the_bits_of_the_plain_update_wherever_the_homes_are(
    tmp_path: Path, places: list[dict[Role, Tier]]
) -> None:
    with rig(tmp_path, places, Faults()) as r:
        for _ in range(3):
            wait_for_all(r.submit())
            r.check()


def test_steps_submitted_one_after_the_other_run_one_after_the_other(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["mixed"], Faults()) as r:
        tickets = [ticket for _ in range(4) for ticket in r.submit()]
        assert wait_for_all(tickets) == []
        r.check()


def count_calls(folder: Path, work: Callable[[Rig], object], places: list[dict[Role, Tier]]) -> int:
    with rig(folder, places, Faults()) as r:
        work(r)
        return r.faults.calls


@pytest.mark.parametrize("places", [PLACES["disk"][:2], PLACES["mixed"]], ids=["disk", "mixed"])
def test_a_failure_of_any_one_call_surfaces_once_and_then_costs_nothing(
    tmp_path: Path, places: list[dict[Role, Tier]]
) -> None:
    for k in range(count_calls(tmp_path, lambda r: wait_for_all(r.submit()), places)):
        with rig(tmp_path, places, Faults(k)) as r:
            errors = wait_for_all(r.submit())
            (error,) = errors
            assert f"call {k} fails" in str(error)
            assert re.search(r"in the optimizer's update of w(, w)* (and \d more )?\(chunk \d\)", str(error)), error
            r.check()
            assert wait_for_all(r.submit()) == []
            r.check()


def test_a_failure_of_any_one_call_keeps_steps_in_order_that_were_submitted_before_anyone_waited(
    tmp_path: Path,
) -> None:
    def two_steps(r: Rig) -> list[BaseException]:
        return wait_for_all([*r.submit(0), *r.submit(1, 0), *r.submit(2)])

    for k in range(count_calls(tmp_path, two_steps, PLACES["disk"])):
        with rig(tmp_path, PLACES["disk"], Faults(k)) as r:
            assert len(two_steps(r)) >= 1
            r.check()


@pytest.mark.parametrize("seed", range(20))
def test_many_failures_in_a_row_lose_nothing(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    with rig(tmp_path, PLACES["disk"], Faults(*generator.sample(range(400), 60))) as r:
        for _ in range(2):
            wait_for_all([ticket for _ in range(2) for ticket in r.submit()])
            r.check()


def test_as_long_as_the_disk_is_broken_every_wait_raises_and_nothing_hangs(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["disk"], Faults()) as r:
        r.faults.always = True
        tickets = r.submit()
        for _ in range(3):
            for ticket in tickets:
                with pytest.raises(OffloadError):
                    ticket.wait()
        r.faults.always = False
        wait_for_all(tickets)
        r.check()


def test_a_step_submitted_behind_one_that_failed_fails_with_it_and_is_retried_with_it(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["disk"], Faults()) as r:
        r.faults.always = True
        (first,) = r.submit(0)
        with pytest.raises(OffloadError):
            first.wait()
        (second,) = r.submit(1)
        with pytest.raises(OffloadError):
            second.wait()
        r.faults.always = False
        wait_for_all([second, first])
        r.check()


def test_chunks_are_over_in_the_order_submitted(tmp_path: Path) -> None:
    with rig(tmp_path, [ON_DISK, IN_RAM] * 10, Faults()) as r:
        tickets = r.submit()
        for i in (3, 10, 19):
            tickets[i].wait()
            assert all(ticket.done() for ticket in tickets[: i + 1])
        r.check()


def test_many_chunks_stream_through_a_staging_of_tiny_blocks(tmp_path: Path) -> None:
    with rig(tmp_path, [ON_DISK, MIXED] * 20, Faults(), tensors=7, numel=100) as r:
        assert wait_for_all(r.submit()) == []
        r.check()


def test_a_chunk_in_ram_needs_no_staging(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["ram"], Faults()) as r:
        plain = UpdateQueue(None)
        r.queue.close()
        r.queue = plain
        wait_for_all(r.submit())
        r.check()


def test_the_full_copy_is_refreshed_in_the_same_pass_where_there_was_a_gradient(tmp_path: Path) -> None:
    with rig(tmp_path, [ON_DISK, IN_RAM], Faults()) as r:
        for chunk in r.chunks:
            chunk.full.fill_(7.0)
        at_step = AdamAtStep(scalars(HYPER, 1))
        updates = [ChunkUpdate(chunk, runs_of(chunk.layout, at_step), chunk.full) for chunk in r.chunks]
        wait_for_all(r.queue.submit(updates))
        for chunk in r.chunks:
            expected = torch.full_like(chunk.full, 7.0)
            for run in runs_of(chunk.layout, at_step):
                expected[run.start : run.stop] = content(chunk, Role.MASTER)[run.start : run.stop].bfloat16()
            assert torch.equal(chunk.full, expected)


def test_an_update_of_no_elements_is_over_at_once(tmp_path: Path) -> None:
    with rig(tmp_path, [IN_RAM], Faults()) as r:
        empty = ChunkUpdate(r.chunks[0], (Run(32, 32, AdamAtStep(scalars(HYPER, 1))),), None)
        nothing = ChunkUpdate(r.chunks[0], (), None)
        assert all(ticket.done() for ticket in r.queue.submit([empty, nothing]))
        assert r.queue.submit([]) == []
        r.check()


def test_an_error_in_the_arithmetic_surfaces_too_and_changes_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, [IN_RAM], Faults()) as r:
        run = Run(0, 50, AdamAtStep(scalars(HYPER, 1)))
        wrong = ChunkUpdate(r.chunks[0], (run,), torch.empty(1000, dtype=torch.float64))
        (ticket,) = r.queue.submit([wrong])
        for _ in range(2):
            with pytest.raises(TypeError, match="out must be"):
                ticket.wait()
        r.check()


def test_closing_finishes_what_is_pending_and_closing_again_does_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["mixed"], Faults()) as r:
        tickets = [*r.submit(), *r.submit()]
        r.queue.close()
        assert all(ticket.done() for ticket in tickets)
        r.check()
        r.queue.close()


def test_the_update_thread_itself_may_close_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The garbage collector runs there too, and it closes models that were dropped.
    monkeypatch.setattr(workers, "END_SECONDS", 0.1)
    with rig(tmp_path, PLACES["disk"], Faults()) as r:
        tickets = r.submit()
        r.queue._thread.submit(r.queue.close).result(30)
        wait_for_all(tickets)
        r.check()


def test_after_closing_a_failed_update_still_says_why(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["disk"], Faults(3)) as r:
        tickets = r.submit()
        r.queue.close()
        for _ in range(2):
            with pytest.raises(OffloadError, match="call 3 fails"):
                tickets[-1].wait()


def test_a_waiter_that_wakes_after_another_began_the_retry_waits_for_the_retry(tmp_path: Path) -> None:
    with rig(tmp_path, [IN_RAM], Faults()) as r:
        ticket = Ticket(r.queue, 1)
        seen: list[object] = []

        def wait() -> None:
            try:
                ticket.wait()
                seen.append(ticket.done())
            except OffloadError:
                seen.append("the error")

        waiter = threading.Thread(target=wait)
        waiter.start()
        ticket.fail(OffloadError(5, "once"))
        ticket.reopen()
        waiter.join(0.2)
        ticket.finish_block()
        waiter.join(30)
        assert seen in ([True], ["the error"])  # never that it was over before it was
