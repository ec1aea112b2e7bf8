"""The chunk manager waits for pending updates where it has to."""

import pytest
import torch
from manager_rig import TRAINABLE, Rig, pending

from gemini.chunk import ChunkState, Tier
from gemini.errors import OffloadError, StateError


def test_a_pin_waits_for_the_update_and_shows_its_values() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.use(chunk)
    update = pending(rig, chunk)
    assert rig.is_poisoned(chunk) and update.waits == 0
    rig.manager.pin(chunk)
    assert update.waits == 1 and chunk.update is None and rig.has_values(chunk)


def test_a_fetch_reads_what_the_update_leaves() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    pending(rig, chunk)
    rig.manager.fetch(chunk, background=True)
    rig.manager.pin(chunk)
    assert rig.has_values(chunk)


def test_an_eviction_waits_for_the_update_that_may_write_to_the_full_copy() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.use(chunk)
    update = pending(rig, chunk)
    rig.manager.evict(chunk)
    assert update.waits == 1 and chunk.state is ChunkState.HOME
    rig.use(chunk)
    assert rig.has_values(chunk)


@pytest.mark.parametrize("action", ["fetch", "pin", "evict", "read", "write", "settle"])
def test_a_failed_update_surfaces_at_each_call_until_it_succeeds_and_nothing_is_lost(action: str) -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    if action in ("pin", "evict"):
        rig.use(chunk)
    update = pending(rig, chunk)
    update.error = OffloadError(5, "write error")
    state, used = chunk.state, rig.ledger.used(Tier.DEVICE)
    actions = {
        "fetch": lambda: rig.manager.fetch(chunk),
        "pin": lambda: rig.manager.pin(chunk),
        "evict": lambda: rig.manager.evict(chunk),
        "read": lambda: rig.manager.read(rig.parameters[0][0], "exp_avg"),
        "write": lambda: rig.manager.write(rig.parameters[0][0], "exp_avg", torch.zeros(33)),
        "settle": rig.manager.settle,
    }
    for _ in range(2):
        with pytest.raises(OffloadError, match="write error"):
            actions[action]()
        assert (chunk.state, rig.ledger.used(Tier.DEVICE), chunk.pins) == (state, used, 0)
        assert rig.is_poisoned(chunk)
    update.error = None
    actions[action]()
    rig.use(chunk) if chunk.pins == 0 else None
    assert rig.has_values(chunk)


def test_settling_shows_the_parameters_of_resident_chunks_again() -> None:
    rig = Rig([TRAINABLE, TRAINABLE])
    here, away = rig.chunks
    rig.use(here)
    for chunk in rig.chunks:
        pending(rig, chunk)
    rig.manager.settle()
    assert rig.has_values(here) and rig.is_poisoned(away)
    assert here.update is None and away.update is None


def test_a_chunk_in_use_stays_readable_and_shows_nan_once_it_is_let_go_while_its_update_is_not_over() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.manager.fetch(chunk)
    rig.manager.pin(chunk)
    update = pending(rig, chunk)
    update.error = OffloadError(5, "write error")
    assert chunk.state is ChunkState.IN_USE_UPDATING and not rig.is_poisoned(chunk)
    with pytest.raises(OffloadError, match="write error"):
        rig.manager.pin(chunk)
    chunk.unpin()
    assert chunk.state is ChunkState.READY_UPDATING and rig.is_poisoned(chunk)
    update.error = None
    rig.manager.settle()
    assert chunk.state is ChunkState.READY and rig.has_values(chunk)


def test_a_fetch_behind_an_update_that_fails_leaves_the_chunk_at_home_with_its_update() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    update = pending(rig, chunk)
    assert chunk.state is ChunkState.HOME_UPDATING
    rig.manager.fetch(chunk, background=True)
    assert chunk.state is ChunkState.FETCHING
    update.error = OffloadError(5, "write error")
    with pytest.raises(OffloadError, match="write error"):
        rig.manager.pin(chunk)
    assert chunk.state is ChunkState.HOME_UPDATING and rig.used_bytes_agree()
    update.error = None
    rig.use(chunk)
    assert rig.has_values(chunk) and chunk.update is None


def test_no_update_begins_while_the_full_copy_is_arriving() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.manager.fetch(chunk, background=True)
    with pytest.raises(StateError, match="chunk 0: FETCHING"):
        pending(rig, chunk)


def test_an_update_may_be_noted_twice_and_another_one_not_while_it_is_under_way() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.use(chunk)
    update = pending(rig, chunk)
    chunk.begin_update(update, range(len(chunk.bindings)))
    assert chunk.state is ChunkState.READY_UPDATING and chunk.update is update
    with pytest.raises(StateError, match="READY_UPDATING -> READY_UPDATING"):
        pending(rig, chunk)
