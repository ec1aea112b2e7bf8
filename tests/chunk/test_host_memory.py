"""RAM for homes: huge pages are asked for where they pay, and never beyond the tensor; streams do not collide."""

import itertools

import pytest
import torch

from gemini.chunk import RamBackend, Tier, host_memory


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(host_memory, "_madvise", lambda: lambda start, nbytes, advice: calls.append((start, nbytes)))
    return calls


def test_large_homes_are_advised_from_their_first_to_their_last_whole_page(advised: list[tuple[int, int]]) -> None:
    backend = RamBackend(None)
    home = backend.home(Tier.HOST, (8 << 20) + 3, torch.bfloat16).tensor
    backend.close()
    assert home is not None
    ((start, nbytes),) = advised
    begin, end = home.untyped_storage().data_ptr(), home.data_ptr() + home.numel() * 2
    assert start % 4096 == nbytes % 4096 == 0
    assert begin <= start < begin + 4096
    assert end - 4096 < start + nbytes <= end


def test_small_homes_and_none_at_all_are_left_alone(advised: list[tuple[int, int]]) -> None:
    for numel in (0, 1, 1 << 19):
        host_memory.advise_huge_pages(torch.zeros(numel))
    assert advised == []


def test_the_real_call_changes_no_value() -> None:
    tensor = torch.arange(2 << 20, dtype=torch.float32)
    host_memory.advise_huge_pages(tensor)
    assert torch.equal(tensor, torch.arange(2 << 20, dtype=torch.float32))


def test_without_the_system_call_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_madvise", lambda: None)
    host_memory.advise_huge_pages(torch.zeros(2 << 20))


def begin_where_the_last_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as the heap hands them out: what is added to a home in front shifts the next one back."""
    zeros, blocks = torch.zeros, itertools.count()

    def placed(nbytes: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        around = zeros(nbytes + 8192, dtype=dtype, device=device)
        start = -(around.data_ptr() + next(blocks) * 832) % 4096
        return around[start : start + nbytes]

    monkeypatch.setattr(torch, "zeros", placed)


@pytest.mark.parametrize("is_heap", [False, True])
def test_large_homes_made_one_after_the_other_begin_at_different_places_in_the_page(
    is_heap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_heap:
        begin_where_the_last_ended(monkeypatch)
    homes = [host_memory.zeroed(1 << 20, torch.float32) for _ in range(4)]
    assert len({home.data_ptr() % 4096 for home in homes}) == 4
    for home in homes:
        assert home.data_ptr() % 64 == 0
        assert home.shape == (1 << 20,)
        assert home.dtype is torch.float32
        assert not home.any()


def test_small_homes_take_no_byte_more_than_they_hold() -> None:
    assert host_memory.zeroed(1000, torch.bfloat16).untyped_storage().nbytes() == 2000
    assert host_memory.zeroed(0, torch.float32).shape == (0,)
