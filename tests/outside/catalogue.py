"""All uses outside of forward, by name."""

from outside.gradients import gradients
from outside.harness import PLACEMENTS, Placement, Use
from outside.libraries import libraries
from outside.reading import reading
from outside.states import states
from outside.surgery import surgery
from outside.trainings import TRAININGS, LibraryTraining
from outside.writing import writing

USES: dict[str, Use | LibraryTraining] = {
    name: use
    for catalogue in (reading, writing, gradients, states, surgery, libraries)
    for name, use in catalogue.uses.items()
} | TRAININGS


def is_worth_a_run(use: Use | LibraryTraining, placement: Placement) -> bool:
    """Whether this placement can show something that the others don't."""
    if use.needs_host and placement.device != "cpu":
        return False
    return placement.topics is None or use.topic in placement.topics


def cases() -> list[tuple[str, str]]:
    """All pairs of a use and a placement on CPU."""
    return [(u, p) for u, use in USES.items() for p, placement in PLACEMENTS.items() if is_worth_a_run(use, placement)]
