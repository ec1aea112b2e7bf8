"""``@pytest.mark.one_in(n)``: of a test's parameters one in ``n`` runs by default, the others with ``-m heavy``.

The marks are given when a function is collected, before anything is selected. A process that is asked for some of the
tests only, as those of ``own_process``, therefore sees the same marks.
"""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import Any
from zlib import crc32

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    made = yield
    if isinstance(made, list):
        items = [item for item in made if hasattr(item, "callspec") and not item.get_closest_marker("heavy")]
        marker = items[0].get_closest_marker("one_in") if items else None
        if marker is not None:
            start = crc32(items[0].originalname.encode())  # other tests of a file run in other placements
            keep = sampled([item.callspec.params for item in items], *marker.args, **marker.kwargs, start=start)
            for item, is_kept in zip(items, keep, strict=True):
                if not is_kept:
                    item.add_marker(pytest.mark.heavy)
    return made


def sampled(cases: Sequence[Mapping[str, Any]], n: int, by: str | None = None, start: int = 0) -> list[bool]:
    """Which of a test's cases run by default, each given as its arguments.

    Of a list every ``n``-th case does. Of a grid those do whose places along all arguments add up to a multiple of
    ``n``: next to one value other values of another argument run than next to the following one. In a grid each value
    of each argument runs at least once, so that a small or ragged grid may keep more. With ``by`` only the values of
    this argument do: the cases next to each of them are a list. Without it counting begins at ``start``.
    """
    if by is not None:
        return _every(n, [case[by] for case in cases])
    # Arguments that go together count once, and what is the same in all cases is no argument.
    columns = {tuple(_places([case[name] for case in cases])) for name in cases[0]}
    grid = sorted(column for column in columns if any(column))
    if not grid:
        return [True] * len(cases)
    if len(grid) == 1:
        return _every(n, [None] * len(cases), start)
    keep = [(sum(row) + start) % n == 0 for row in zip(*grid, strict=True)]
    for column in grid:
        _keep_one_of_each(column, keep)
    return keep


def _every(n: int, values: Sequence[Any], start: int = 0) -> list[bool]:
    """Of the cases with the same value every ``n``-th, and at least one."""
    places = _places(values)
    lengths, seen = Counter(places), Counter[int]()
    keep = []
    for place in places:
        keep.append(seen[place] % n == start % min(n, lengths[place]))
        seen[place] += 1
    return keep


def _keep_one_of_each(column: Sequence[int], keep: list[bool]) -> None:
    running = {place for place, is_kept in zip(column, keep, strict=True) if is_kept}
    for index, place in enumerate(column):
        if place not in running:
            keep[index] = True
            running.add(place)


def _places(values: Sequence[Any]) -> list[int]:
    """The number of each value among those that differ, in their order."""
    places: dict[Any, int] = {}
    return [places.setdefault(_key(value), len(places)) for value in values]


def _key(value: Any) -> Any:
    """Equal for equal plain values and for the same object: parameters need not be hashable."""
    return (type(value), value) if isinstance(value, str | int | float) else id(value)
