"""Gradients never are there all at once: the room they take, by the operating system, the packing and the pool."""

from typing import Any

import pytest
import torch
from limited import limited, outcome

from gemini.chunk import ChunkLayout, Ledger, MemoryMap, RamBackend, Slot, Tier, gradient_pool
from gemini.chunk.eviction import Eviction
from gemini.chunk.full_copies import FullCopies
from gemini.chunk.gradient import GradientBuffer
from gemini.chunk.gradient_pool import GradientPool
from gemini.chunk.layout import size_class
from gemini.chunk.snapshots import Snapshots
from gemini.errors import OutOfMemory
from gemini.planning.gradient_room import gradient_room


@pytest.mark.timeout(300)
@pytest.mark.heavy
def test_under_a_limit_of_the_system_gradients_of_a_few_chunks_fit_and_all_do_not() -> None:
    """fp32: 12 bytes of master and moments and 4 of gradient a parameter, and what malloc leaves between; 24 chunks."""
    normal = {"precision": "fp32", "update_in_backward": False}
    ours, roomy = limited(13.0, 24, **{**normal, "update_in_backward": True}), limited(18.0, 24, **normal)
    assert outcome(ours) == outcome(roomy)
    short = limited(13.0, 24, **normal)
    assert short.returncode != 0
    assert "llocate memory" in short.stderr or "out of memory" in short.stderr, short.stderr[-2000:]


# -- how much


def stages(*chunks: set[int]) -> list[frozenset[int]]:
    return [frozenset(c) for c in chunks]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (stages({0}, {1}, {2}, {3}), 2),  # one, and the one before under way
        (stages({0}, {0, 1}, {1}, {1, 2}, {2}), 3),  # the next one comes before another is through
        (stages({0}, {1}, {2}, {3}, {0}), 3),  # tied: there all along
        (stages({0, 1, 2}), 3),
        (stages({0}, {1}, {0}, {1}), 2),
        (stages({0}, {7}, {7}), 1),  # frozen ones take nothing
    ],
)
def test_room_is_for_chunks_that_wait_and_one_under_way(order: list[frozenset[int]], expected: int) -> None:
    assert gradient_room(order, dict.fromkeys(range(4), 1024)) == expected * 1024


def test_sizes_are_rounded_by_an_eighth_at_most() -> None:
    for nbytes in range(1, 100_000, 37):
        rounded = size_class(nbytes)
        assert nbytes <= rounded <= max(64 * -(-nbytes // 64), nbytes * 1.125)
        assert size_class(rounded) == rounded


# -- lending


class Use:
    """An update that is over when someone waits for it."""

    def __init__(self, errors: int = 0) -> None:
        self.is_over = False
        self.errors = errors

    def wait(self) -> None:
        if self.errors:
            self.errors -= 1
            raise OSError("the disk is away")
        self.is_over = True


def layout(index: int, numel: int = 256) -> ChunkLayout:
    return ChunkLayout(index, numel, (Slot(0, f"p{index}", 0, numel - 32, (numel - 32,), (1,)),))


def pool(room: int, capacity: int = 1 << 20) -> tuple[GradientPool, RamBackend]:
    backend = RamBackend(None)
    ledger = Ledger({Tier.HOST: capacity}, MemoryMap.UNIFIED)
    full_copies = FullCopies(ledger, backend)
    eviction = Eviction(ledger, full_copies, lambda: 0, Snapshots(full_copies, backend, ledger))
    lender = GradientPool(ledger, backend, None, eviction)
    lender.reserve(Tier.HOST, room, "room")
    return lender, backend


def gradient(lender: GradientPool, backend: RamBackend, index: int, numel: int = 256) -> GradientBuffer:
    lay = layout(index, numel)
    return GradientBuffer(lay, None, backend, lambda: lender.borrow(lay, Tier.HOST, torch.float32))


def fill(buffer: GradientBuffer, value: float) -> None:
    buffer.add(0, torch.full((buffer.layout.slots[0].numel,), value))


def test_memory_is_lent_again_when_the_update_is_over_and_not_before() -> None:
    lender, backend = pool(2048)
    first, second, third = (gradient(lender, backend, i) for i in range(3))
    fill(first, 1.0), fill(second, 2.0)
    use = Use()
    lender.retire(first, use)
    first.clear()
    assert first.buffer is not None and not use.is_over  # the update still reads it
    fill(third, 3.0)
    assert use.is_over and first.buffer is None  # waited for, as there was no other
    assert lender.growths == 0
    assert float(second.read(0).sum()) == 2.0 * 224 and float(third.read(0).sum()) == 3.0 * 224
    assert third.buffer is not None and third.buffer.tensor is not None
    assert float(third.buffer.tensor[224:].abs().sum()) == 0.0  # what no slot covers
    backend.close()


@pytest.mark.parametrize(("longest", "kept"), [(1024, 1024), (1023, 0)])
def test_a_large_block_goes_back_to_the_system_when_it_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, longest: int, kept: int
) -> None:
    monkeypatch.setattr(gradient_pool, "KEPT_NBYTES", longest)
    lender, backend = pool(1024)
    chunk, use = gradient(lender, backend, 0), Use()
    fill(chunk, 1.0)
    lender.retire(chunk, use)
    chunk.clear()
    assert lender.blocks_nbytes == 1024  # the update still reads it
    lender.take_all_back()
    assert use.is_over and lender.blocks_nbytes == kept
    fill(chunk, 2.0)
    assert float(chunk.read(0).sum()) == 2.0 * 224 and lender.growths == 0
    backend.close()


def test_a_chunk_that_comes_again_before_its_memory_is_taken_back_gets_other_memory() -> None:
    lender, backend = pool(2048)
    chunk, other = gradient(lender, backend, 0), gradient(lender, backend, 1)
    fill(chunk, 1.0)
    use = Use()
    lender.retire(chunk, use)
    chunk.clear()
    fill(chunk, 2.0)
    use.is_over = True
    fill(other, 3.0)  # the first loan ends, the second one stays
    assert float(chunk.read(0).sum()) == 2.0 * 224 and float(other.read(0).sum()) == 3.0 * 224
    backend.close()


def test_an_update_that_fails_is_waited_for_again_before_it_ends_the_backward() -> None:
    lender, backend = pool(1024)
    first, second = gradient(lender, backend, 0), gradient(lender, backend, 1)
    fill(first, 1.0)
    lender.retire(first, Use(errors=2))
    fill(second, 2.0)
    lender.retire(second, Use(errors=3))
    with pytest.raises(OSError, match="the disk is away"):
        fill(gradient(lender, backend, 2), 3.0)
    backend.close()


def test_it_grows_within_the_capacity_and_says_what_is_missing() -> None:
    lender, backend = pool(1024, capacity=2048)
    kept: list[Any] = [gradient(lender, backend, i) for i in range(3)]
    fill(kept[0], 1.0), fill(kept[1], 2.0)
    assert (lender.growths, lender.nbytes) == (1, 2048)
    with pytest.raises(OutOfMemory, match=r"gradient of chunk 2 \(with p2\).*set host_memory to 3072 bytes"):
        fill(kept[2], 3.0)
    backend.close()
