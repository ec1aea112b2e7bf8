"""Gaps of a file or a block: first fit, apart, and one again when all is given back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.chunk.free_room import FreeRoom

NBYTES = 64


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=40))
def test_what_is_taken_is_apart_and_the_first_gap_that_fits(steps: list[tuple[bool, int]]) -> None:
    room, taken = FreeRoom(NBYTES), dict[int, int]()
    is_free = [True] * NBYTES
    for gives, number in steps:
        if gives and taken:
            begin = sorted(taken)[number % len(taken)]
            nbytes = taken.pop(begin)
            room.give(begin, nbytes)
            is_free[begin : begin + nbytes] = [True] * nbytes
        elif number:
            fits = [i for i in range(NBYTES - number + 1) if all(is_free[i : i + number])]
            found = room.take(number)
            assert found == (fits[0] if fits else None)
            if found is not None:
                taken[found] = number
                is_free[found : found + number] = [False] * number
        runs = "".join(" x"[free] for free in is_free).split()
        assert room.largest == max(map(len, runs), default=0) and room.is_whole == (not taken)


@pytest.mark.parametrize(("begin", "nbytes"), [(0, 10), (30, 10), (5, 10), (50, 20)])
def test_what_was_not_taken_is_not_given_back(begin: int, nbytes: int) -> None:
    room = FreeRoom(60)
    assert room.take(40) == 0
    room.give(0, 10)
    room.give(30, 10)
    with pytest.raises(AssertionError):
        room.give(begin, nbytes)
