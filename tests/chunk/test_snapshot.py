"""What a snapshot has stays what it was, whatever changes the chunks, within the memory that it was given."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from manager_rig import NUMEL, TRAINABLE, Rig
from torch import Tensor

from gemini.chunk import ALONE, MASTER, Chunk, DiskBackend, Ledger, MemoryMap, Tier
from gemini.chunk.snapshot import Snapshot
from gemini.chunk.values import read_slot, write_slot
from gemini.errors import OffloadError

NAMES = (MASTER, "exp_avg", "exp_avg_sq")
SLOT_NBYTES = (33 * 4, 20 * 4)
SECONDS = 20.0


def rig_of(tier: Tier, folder: Path) -> Rig:
    disk = DiskBackend(folder, Ledger({Tier.DISK: 1 << 20}, MemoryMap.EMULATED))
    rig = Rig([dict.fromkeys(TRAINABLE, tier)] * 2, room=20, disk=disk)
    for chunk in rig.chunks:
        for position in range(2):
            for name in NAMES:
                write_slot(chunk, position, name, torch.randn(chunk.layout.slots[position].shape))
    return rig


def everything(rig: Rig) -> dict[Chunk, dict[int, tuple[str, ...]]]:
    return {chunk: {0: NAMES, 1: NAMES} for chunk in rig.chunks}


def values(rig: Rig, read: Callable[[Chunk, int, str], Tensor]) -> list[Tensor]:
    return [read(chunk, position, name) for chunk in rig.chunks for position in range(2) for name in NAMES]


def now(rig: Rig) -> list[Tensor]:
    return values(rig, partial(read_slot, communicator=ALONE))


def change_all(rig: Rig) -> None:
    for chunk in rig.chunks:
        for position in range(2):
            for name in NAMES:
                write_slot(chunk, position, name, torch.tensor(-7.0))


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], object]], threading.Thread]]:
    threads: list[threading.Thread] = []

    def start(work: Callable[[], object]) -> threading.Thread:
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST, Tier.DISK])
def test_values_are_read_as_they_were_on_every_tier(tier: Tier, tmp_path: Path) -> None:
    rig = rig_of(tier, tmp_path)
    before, used = now(rig), rig.ledger.used(Tier.HOST)
    snapshot = Snapshot(everything(rig), rig.ledger, 1 << 20)
    change_all(rig)
    assert rig.ledger.used(Tier.HOST) == used + snapshot.nbytes == used + 2 * 3 * sum(SLOT_NBYTES)
    assert all(map(torch.equal, values(rig, snapshot.read), before))
    assert all(bool((value == -7).all()) for value in now(rig))
    assert snapshot.nbytes == 0 and rig.ledger.used(Tier.HOST) == used
    snapshot.close()
    rig.manager.close()


def test_what_has_been_read_is_not_copied(tmp_path: Path) -> None:
    rig = rig_of(Tier.HOST, tmp_path)
    snapshot = Snapshot(everything(rig), rig.ledger, 1 << 20)
    values(rig, snapshot.read)
    change_all(rig)
    assert snapshot.copied_bytes == 0
    snapshot.close()


def test_what_nobody_wants_is_not_copied(tmp_path: Path) -> None:
    rig = rig_of(Tier.HOST, tmp_path)
    snapshot = Snapshot({rig.chunks[0]: {1: (MASTER,)}}, rig.ledger, 1 << 20)
    change_all(rig)
    assert snapshot.copied_bytes == SLOT_NBYTES[1]
    snapshot.close()
    assert snapshot.nbytes == 0


@pytest.mark.parametrize("limit", [0, SLOT_NBYTES[0], 3 * SLOT_NBYTES[0]])
def test_what_finds_no_room_waits_for_the_reader(limit: int, tmp_path: Path, in_thread: Callable[..., object]) -> None:
    rig = rig_of(Tier.HOST, tmp_path)
    before = now(rig)
    snapshot = Snapshot(everything(rig), rig.ledger, limit)
    most = 0

    def noting(chunk: Chunk, position: int, name: str) -> Tensor:
        nonlocal most
        most = max(most, snapshot.nbytes)
        return snapshot.read(chunk, position, name)

    changing = in_thread(lambda: change_all(rig))
    assert all(map(torch.equal, values(rig, noting), before))
    changing.join(SECONDS)
    assert most <= limit
    assert all(bool((value == -7).all()) for value in now(rig))
    snapshot.close()


def test_a_change_waits_where_the_tier_has_no_room_for_a_copy(tmp_path: Path, in_thread: Callable[..., object]) -> None:
    rig = rig_of(Tier.HOST, tmp_path)
    before = now(rig)
    rig.ledger.take(Tier.HOST, rig.ledger.free(Tier.HOST), "all there is")
    snapshot = Snapshot(everything(rig), rig.ledger, 1 << 20)
    in_thread(lambda: change_all(rig))
    assert all(map(torch.equal, values(rig, snapshot.read), before))
    assert snapshot.copied_bytes == 0
    snapshot.close()


def test_a_reader_that_gives_up_lets_changes_go_on(tmp_path: Path, in_thread: Callable[..., object]) -> None:
    rig = rig_of(Tier.HOST, tmp_path)
    snapshot = Snapshot(everything(rig), rig.ledger, 0)
    changing = in_thread(lambda: change_all(rig))
    snapshot.close()
    changing.join(SECONDS)
    assert all(bool((value == -7).all()) for value in now(rig))


def test_room_that_is_asked_back_comes_when_copies_are_read(tmp_path: Path, in_thread: Callable[..., object]) -> None:
    rig = rig_of(Tier.HOST, tmp_path)
    before, used = now(rig), rig.ledger.used(Tier.HOST)
    snapshot = Snapshot(everything(rig), rig.ledger, 1 << 20)
    change_all(rig)
    given: list[tuple[bool, int]] = []
    asking = in_thread(lambda: given.append((snapshot.give_room(), rig.ledger.used(Tier.HOST))))
    assert all(map(torch.equal, values(rig, snapshot.read), before))
    asking.join(SECONDS)
    assert given == [(True, used)]
    snapshot.close()


def test_a_copy_that_fails_is_the_readers_error_and_the_change_goes_on(tmp_path: Path, monkeypatch) -> None:
    rig = rig_of(Tier.HOST, tmp_path)
    snapshot = Snapshot(everything(rig), rig.ledger, 1 << 20)

    def broken(*args: object) -> Tensor:
        raise OffloadError(5, "the disk is away")

    with monkeypatch.context() as patched:
        patched.setattr("gemini.chunk.snapshot.read_slot", broken)
        write_slot(rig.chunks[1], 0, MASTER, torch.tensor(-7.0))
    assert bool((read_slot(rig.chunks[1], 0, MASTER, ALONE) == -7).all())
    with pytest.raises(OffloadError, match="the disk is away"):
        snapshot.read(rig.chunks[0], 0, MASTER)
    snapshot.close()
    assert snapshot.nbytes == 0


def test_a_parameter_that_is_its_own_home_and_changes_without_a_word_is_an_error(tmp_path: Path) -> None:
    rig = Rig([TRAINABLE], unified=True, dtype=torch.float32)
    (chunk,) = rig.chunks
    assert chunk.full_is_home
    snapshot = Snapshot({chunk: {0: (MASTER,), 1: (MASTER,)}}, rig.ledger, 1 << 20)
    rig.parameters[0][0].mul_(2)
    with pytest.raises(RuntimeError, match=r"w0 was changed in place by a forward .* use_async=False"):
        snapshot.read(chunk, 0, MASTER)
    snapshot.close()
    rig.manager.quiet(chunk)
    assert chunk.homes.edited_in_place == {0}


def test_a_parameter_that_was_changed_in_place_before_is_copied_at_once(tmp_path: Path) -> None:
    rig = Rig([TRAINABLE], unified=True, dtype=torch.float32)
    (chunk,) = rig.chunks
    parameter = rig.parameters[0][0]
    parameter.mul_(2)
    before = parameter.clone()
    read: list[Tensor] = []
    may_read = threading.Event()

    def work() -> None:
        assert may_read.wait(SECONDS)
        snapshot = rig.manager.snapshots.of_reader
        assert snapshot is not None
        read.append(snapshot.read(chunk, 0, MASTER))

    rig.manager.snapshots.begin({chunk: {0: (MASTER,)}}, work)
    parameter.mul_(2)
    may_read.set()
    rig.manager.snapshots.wait()
    assert torch.equal(read[0], before)
    assert rig.manager.snapshots.of_reader is None


def test_the_error_of_the_work_is_raised_once(tmp_path: Path) -> None:
    rig = rig_of(Tier.HOST, tmp_path)

    def work() -> None:
        raise ValueError("no")

    rig.manager.snapshots.begin({}, work)
    rig.manager.snapshots.rest()
    with pytest.raises(ValueError, match="no"):
        rig.manager.snapshots.raise_fault()
    rig.manager.snapshots.raise_fault()
    rig.manager.snapshots.wait()


def test_a_fault_that_nobody_was_told_of_is_logged_at_the_end(tmp_path: Path, caplog) -> None:
    rig = rig_of(Tier.HOST, tmp_path)

    def work() -> None:
        raise ValueError("never told")

    rig.manager.snapshots.begin({}, work)
    rig.manager.close()
    assert "never told" in caplog.text


def test_homes_do_not_move_while_they_are_read(tmp_path: Path) -> None:
    rig = rig_of(Tier.HOST, tmp_path)
    before = now(rig)
    read: list[Tensor] = []

    def work() -> None:
        snapshot = rig.manager.snapshots.of_reader
        assert snapshot is not None
        read.extend(values(rig, snapshot.read))

    rig.manager.snapshots.begin(everything(rig), work)
    rig.manager.rebuild([chunk.plan for chunk in rig.chunks])
    assert not rig.manager.snapshots.is_under_way
    assert all(map(torch.equal, read, before)) and len(read) == 12


def test_updates_and_a_reader_side_by_side_leave_nothing_torn(tmp_path: Path) -> None:
    """Many snapshots, each of one value everywhere, while another thread fills all homes with ever new ones."""
    rig = Rig([TRAINABLE] * 4, room=20)
    stop = threading.Event()
    turn = threading.Lock()
    value = 0.0

    def update() -> None:
        nonlocal value
        while not stop.is_set():
            with turn:
                value += 1
                for chunk in rig.chunks:
                    chunk.homes.before_change(0, NUMEL)
                    chunk.homes[MASTER].write(0, torch.full((NUMEL,), value))

    for chunk in rig.chunks:
        chunk.homes[MASTER].write(0, torch.zeros(NUMEL))
    thread = threading.Thread(target=update)
    thread.start()
    try:
        for limit in [0, 300, 1 << 20] * 10:
            with turn:
                expected = value
                snapshot = Snapshot({c: {0: (MASTER,), 1: (MASTER,)} for c in rig.chunks}, rig.ledger, limit)
            for chunk in rig.chunks:
                for position in (1, 0):
                    assert bool((snapshot.read(chunk, position, MASTER) == expected).all())
            snapshot.close()
    finally:
        stop.set()
        thread.join(SECONDS)
    assert value > 0 and not thread.is_alive()
