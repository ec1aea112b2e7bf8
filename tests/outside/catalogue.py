"""All uses outside of forward, by name."""

from outside.gradients import gradients
from outside.harness import Use
from outside.libraries import libraries
from outside.reading import reading
from outside.states import states
from outside.surgery import surgery
from outside.writing import writing

USES: dict[str, Use] = {
    name: use
    for catalogue in (reading, writing, gradients, states, surgery, libraries)
    for name, use in catalogue.uses.items()
}
