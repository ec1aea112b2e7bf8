"""The chunk manager moves chunks: states, bytes and room, on a fake device that counts every byte."""

import pytest
import torch
from manager_rig import FROZEN, NUMEL, TRAINABLE, Rig

from gemini.chunk import MASTER, ChunkState, Tier
from gemini.errors import OffloadError, OutOfMemory, StateError

# -- fetching, pinning, evicting


def test_parameters_read_nan_while_away_and_their_values_while_pinned() -> None:
    rig = Rig([TRAINABLE, FROZEN])
    for chunk in rig.chunks:
        assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
        rig.manager.fetch(chunk)
        rig.manager.pin(chunk)
        assert chunk.state is ChunkState.IN_USE and rig.has_values(chunk)
        chunk.unpin()
        assert chunk.state is ChunkState.READY and rig.has_values(chunk)
        rig.manager.evict(chunk)
        assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
        assert chunk.full.untyped_storage().nbytes() == 0


def test_a_view_that_autograd_kept_sees_the_values_again_after_a_fetch() -> None:
    rig = Rig([TRAINABLE])
    rig.use(rig.chunks[0])
    kept = rig.parameters[0][0].view(3, 11)
    rig.manager.evict(rig.chunks[0])
    rig.use(rig.chunks[0])
    assert torch.equal(kept, rig.values[0][0].bfloat16().view(3, 11))


def test_fetching_what_is_there_moves_nothing() -> None:
    rig = Rig([TRAINABLE])
    rig.use(rig.chunks[0])
    before = list(rig.device.log)
    rig.manager.fetch(rig.chunks[0])
    assert rig.device.log == before and rig.manager.moves.fetch_count == 1


def test_nested_pins_hold_until_the_last_one_goes() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.manager.fetch(chunk)
    for _ in range(3):
        rig.manager.pin(chunk)
    for _ in range(2):
        chunk.unpin()
        assert chunk.state is ChunkState.IN_USE
        with pytest.raises(StateError):
            rig.manager.evict(chunk)
        assert rig.has_values(chunk)
    chunk.unpin()
    rig.manager.evict(chunk)
    assert chunk.pins == 0 and rig.ledger.used(Tier.DEVICE) == 0


def test_what_was_not_asked_for_first_raises() -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    with pytest.raises(StateError, match="chunk 0: HOME -> IN_USE"):
        rig.manager.pin(chunk)
    with pytest.raises(StateError, match="chunk 0: HOME -> HOME"):
        rig.manager.evict(chunk)
    with pytest.raises(AssertionError, match="chunk 0 is not pinned"):
        chunk.unpin()
    assert chunk.state is ChunkState.HOME and chunk.pins == 0 and rig.used_bytes_agree()


def test_a_prefetched_chunk_arrives_when_it_is_pinned_and_is_counted() -> None:
    rig = Rig([TRAINABLE, TRAINABLE])
    first, second = rig.chunks
    rig.manager.fetch(first, background=True)
    rig.manager.fetch(second)
    assert first.state is ChunkState.FETCHING and not first.has_arrived and rig.is_poisoned(first)
    assert second.has_arrived
    rig.manager.pin(first)
    rig.manager.pin(first)
    assert rig.has_values(first)
    moves = rig.manager.moves
    assert (moves.fetch_count, moves.prefetch_count, moves.prefetch_used, moves.miss_count) == (2, 1, 1, 1)
    assert moves.fetch_bytes == 2 * NUMEL * 2


# -- room


def test_the_least_recently_used_chunk_goes_first() -> None:
    rig = Rig([TRAINABLE] * 4, room=3)
    a, b, c, d = rig.chunks
    for chunk in (a, b, c, a):
        rig.use(chunk)
    rig.manager.fetch(d)
    assert [chunk.is_resident for chunk in rig.chunks] == [True, False, True, True]


def test_a_chunk_that_is_arriving_goes_after_all_that_are_idle() -> None:
    rig = Rig([TRAINABLE] * 3, room=2)
    a, b, c = rig.chunks
    rig.manager.fetch(a, background=True)
    rig.use(b)
    rig.manager.fetch(c)
    assert [chunk.is_resident for chunk in rig.chunks] == [True, False, True]
    rig.manager.pin(c)
    rig.manager.fetch(b)
    assert [chunk.is_resident for chunk in rig.chunks] == [False, True, True]


def test_what_is_to_be_kept_is_not_evicted_although_nothing_has_pinned_it_yet() -> None:
    rig = Rig([TRAINABLE] * 4, room=3)
    a, b, c, d = rig.chunks
    rig.manager.fetch(a, background=True)
    rig.use(b)
    rig.use(c)
    rig.manager.fetch(d, keep=[a, b])
    assert [chunk.is_resident for chunk in rig.chunks] == [True, True, False, True]
    with pytest.raises(OutOfMemory):
        rig.manager.fetch(c, keep=[a, b, d])
    assert rig.used_bytes_agree()


def test_what_is_in_use_is_never_evicted_and_the_message_says_how_much_is_enough() -> None:
    rig = Rig([TRAINABLE] * 3, room=2)
    for chunk in rig.chunks[:2]:
        rig.manager.fetch(chunk)
        rig.manager.pin(chunk)
    with pytest.raises(OutOfMemory) as raised:
        rig.manager.fetch(rig.chunks[2])
    message = str(raised.value)
    assert "device tier out of memory" in message and "(with w4)" in message
    assert "0 B are free" in message
    enough = int(message.split("set device_memory to ")[1].split()[0])
    assert enough == rig.capacity + NUMEL * 2
    assert rig.chunks[2].state is ChunkState.HOME and rig.used_bytes_agree()
    assert all(rig.has_values(chunk) for chunk in rig.chunks[:2])

    rig.ledger.resize(Tier.DEVICE, enough)
    rig.device.capacity_bytes = enough
    rig.use(rig.chunks[2])
    assert rig.has_values(rig.chunks[2])


def test_with_one_ram_for_both_the_message_names_host_memory() -> None:
    rig = Rig([TRAINABLE] * 2, unified=True)
    rig.ledger.resize(Tier.HOST, 0)  # to what is used
    with pytest.raises(OutOfMemory, match="host tier out of memory") as raised:
        rig.manager.fetch(rig.chunks[0])
    enough = int(str(raised.value).split("set host_memory to ")[1].split()[0])
    assert enough == rig.ledger.used(Tier.HOST) + NUMEL * 2
    rig.ledger.resize(Tier.HOST, enough)
    rig.use(rig.chunks[0])


def test_a_home_in_reach_of_the_device_is_the_full_copy_and_never_moves() -> None:
    rig = Rig([FROZEN, TRAINABLE], unified=True)
    frozen, trainable = rig.chunks
    assert frozen.full_is_home and not trainable.full_is_home and frozen.full_nbytes == 0
    assert frozen.state is ChunkState.READY and rig.has_values(frozen)
    pointer = rig.parameters[0][0].data_ptr()
    rig.manager.evict(frozen)
    rig.manager.eviction.make_room(trainable)
    rig.use(frozen)
    assert rig.has_values(frozen) and rig.parameters[0][0].data_ptr() == pointer
    assert rig.manager.moves.fetch_count == 0 and rig.device.log == []


@pytest.mark.parametrize("name", ["grow", "upload"])
def test_a_fetch_that_cannot_begin_gives_the_memory_back(name: str) -> None:
    rig = Rig([TRAINABLE])
    (chunk,) = rig.chunks
    rig.device.fail[name] = RuntimeError("the device is lost")
    with pytest.raises(RuntimeError, match="the device is lost"):
        rig.manager.fetch(chunk)
    assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
    assert rig.ledger.used(Tier.DEVICE) == rig.device.used_bytes == 0
    assert chunk.full.untyped_storage().nbytes() == 0
    rig.use(chunk)
    assert rig.has_values(chunk) and rig.manager.moves.fetch_count == 1


@pytest.mark.parametrize("then", ["pin", "evict", "write", "fetch another"])
def test_a_prefetch_that_fails_on_the_way_gives_the_memory_back(then: str) -> None:
    rig = Rig([TRAINABLE, TRAINABLE], room=1)
    chunk, other = rig.chunks
    rig.manager.fetch(chunk, background=True)
    rig.device.transfers[-1].error = OffloadError(5, "read error")
    actions = {
        "pin": lambda: rig.manager.pin(chunk),
        "evict": lambda: rig.manager.evict(chunk),
        "write": lambda: rig.manager.write(rig.parameters[0][0], MASTER, torch.zeros(33)),
        "fetch another": lambda: rig.manager.fetch(other),
    }
    with pytest.raises(OffloadError, match="read error"):
        actions[then]()
    assert chunk.state is ChunkState.HOME and rig.is_poisoned(chunk)
    assert rig.ledger.used(Tier.DEVICE) == rig.device.used_bytes == 0
    rig.use(chunk)
    assert rig.has_values(chunk)
