"""What happens in a soak, drawn before it begins: both sides do the same."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

WEIGHTS = {
    "train": 40,
    "accumulate": 6,
    "evaluate": 8,
    "forward_error": 5,
    "backward_error": 5,
    "interrupt_forward": 3,
    "interrupt_backward": 3,
    "save": 3,
    "save_async": 4,
    "load": 3,
    "resize": 6,
    "rebuild": 2,
    "second_model": 2,
    "read": 5,
    "write": 5,
}
"""How often each kind happens. One more kind is a line here and a method of `sides.Side`."""


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a soak."""

    number: int
    kind: str
    rows: int
    """Of the batch."""
    length: int
    choice: float
    """In [0, 1): which parameter, which budget, which placement."""


_PLACEMENTS = 5
_TOUR_FROM = 500
"""Soaks of at least this number of steps begin with a tour."""


def drawn(steps: int, seed: int, kinds: Sequence[str] = tuple(WEIGHTS)) -> list[Event]:
    """The events of a soak. The same for the same arguments.

    A long one begins with a tour: each placement, and there each kind once. What is made at the first time of anything
    (compiled kernels, threads, caches) is then made before growth is measured.
    """
    rng = random.Random(seed)
    weights = [WEIGHTS[kind] for kind in kinds]
    events = [
        Event(
            number,
            rng.choices(kinds, weights)[0],
            rng.choice((1, 2, 3, 5, 8)),
            rng.choice((4, 9, 16, 32)),
            rng.random(),
        )
        for number in range(steps)
    ]
    if steps < _TOUR_FROM or "rebuild" not in kinds:
        return events
    stops = ["rebuild", *(kind for kind in kinds if kind != "rebuild")]
    tour = [
        replace(events[each * len(stops) + number], kind=kind, choice=(each + 0.5) / _PLACEMENTS)
        for each in range(_PLACEMENTS)
        for number, kind in enumerate(stops)
    ]
    return [*tour, *events[len(tour) :]]


def chosen(event: Event, among: Sequence[Any]) -> Any:
    """The one that the event has chosen."""
    return among[int(event.choice * len(among))]
