"""RAM for homes in large blocks: zero, aligned, apart, and unlocked when the last of them is gone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.chunk.host_arena import HOME_ALIGN_BYTES, PAGE_BYTES, HostArena, padded, registered_block


class Registrar:
    """What a device is told of page-locked ranges."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.locked: list[tuple[int, int]] = []
        self.unlocked: list[int] = []

    def lock(self, address: int, nbytes: int) -> bool:
        if not self.refuses:
            self.locked.append((address, nbytes))
        return not self.refuses

    def arena(self, nbytes: int) -> HostArena:
        arena = HostArena(lambda nbytes: registered_block(nbytes, self.lock, self.unlocked.append))
        arena.reserve(nbytes)
        return arena


@settings(deadline=None, max_examples=100)
@given(sizes=st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([torch.float32, torch.bfloat16])), max_size=12))
def test_homes_of_an_arena_are_zero_aligned_and_apart(sizes: list[tuple[int, torch.dtype]]) -> None:
    registrar = Registrar()
    arena = registrar.arena(sum(padded(numel * dtype.itemsize) for numel, dtype in sizes))
    homes = [arena.take(numel, dtype) for numel, dtype in sizes]
    for i, home in enumerate(homes):
        assert not home.any() and home.data_ptr() % HOME_ALIGN_BYTES == 0
        home.fill_(i + 1)
    assert all(bool((home == i + 1).all()) for i, home in enumerate(homes))
    if any(home.numel() for home in homes):
        ((address, nbytes),) = registrar.locked
        assert address % PAGE_BYTES == 0 and nbytes % PAGE_BYTES == 0
        assert all(address <= h.data_ptr() and h.data_ptr() + h.nbytes <= address + nbytes for h in homes if h.numel())


def test_an_arena_is_unlocked_when_its_last_home_is_gone_and_not_before() -> None:
    registrar = Registrar()
    arena = registrar.arena(1000)
    first, second = arena.take(10, torch.float32), arena.take(10, torch.float32)[2:4]
    address = registrar.locked[0][0]
    del arena, first
    assert registrar.unlocked == []
    del second
    assert registrar.unlocked == [address]


def test_a_system_that_locks_nothing_gives_ordinary_ram() -> None:
    registrar = Registrar(refuses=True)
    arena = registrar.arena(1000)
    assert not arena.take(10, torch.float32).any()
    del arena
    assert registrar.unlocked == []


def test_an_arena_that_is_full_takes_another_block() -> None:
    registrar = Registrar()
    arena = registrar.arena(2 * PAGE_BYTES)
    first = arena.take(PAGE_BYTES // 4, torch.float32)
    second = arena.take(PAGE_BYTES // 2, torch.float32)
    assert len(registrar.locked) == 2 and not second.any()
    first.fill_(1.0)
    assert not second.any()


def test_room_that_is_given_back_is_taken_again_and_zero() -> None:
    registrar = Registrar()
    arena = registrar.arena(3 * PAGE_BYTES)
    first, second, third = (arena.take(PAGE_BYTES // 4, torch.float32) for _ in range(3))
    addresses = [first.data_ptr(), second.data_ptr()]
    first.fill_(1.0), second.fill_(2.0), third.fill_(3.0)
    arena.give_back(second), arena.give_back(first)
    both = arena.take(PAGE_BYTES // 2, torch.float32)  # two gaps that have become one
    assert both.data_ptr() == min(addresses) and not both.any() and third.eq(3.0).all()
    assert len(registrar.locked) == 1


def test_a_block_is_let_go_with_the_last_home_that_is_given_back() -> None:
    registrar = Registrar()
    arena = registrar.arena(2 * PAGE_BYTES)
    homes = [arena.take(PAGE_BYTES // 4, torch.float32) for _ in range(2)]
    for home in homes:
        assert registrar.unlocked == []
        arena.give_back(home)
    del home, homes
    assert registrar.unlocked == [registrar.locked[0][0]]
    assert not arena.take(10, torch.float32).any() and len(registrar.locked) == 2


def test_room_that_is_free_already_is_not_reserved_again() -> None:
    registrar = Registrar()
    arena = registrar.arena(2 * PAGE_BYTES)
    arena.reserve(PAGE_BYTES)
    assert len(registrar.locked) == 1
    arena.reserve(3 * PAGE_BYTES)
    assert len(registrar.locked) == 2
