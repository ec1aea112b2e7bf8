"""The name of a state of training, by which a saved model and a saved optimizer are known to belong together.

::

    boost        a1b2...-0.0
    step()       a1b2...-1.0      what is saved now has this id, whatever part it is
    load_model   a1b2...-1.1      and the id of the file is remembered, until an optimizer's file comes with the same

Between saving a model and saving its optimizer a process may be killed; over an older pair that leaves a new model
beside an old optimizer. They would train on to other numbers than either run, without a word.
"""

from collections.abc import Callable

MODEL, OPTIMIZER = "model", "optimizer"


class StateId:
    """Names the states that one boosted model and its optimizer go through.

    Parameters
    ----------
    origin
        Random, and the same on all ranks.
    count_steps
        How many steps have been taken.
    """

    def __init__(self, origin: str, count_steps: Callable[[], int]) -> None:
        self._origin = origin
        self._count_steps = count_steps
        self._loads = 0
        self._half: tuple[str, str, int] | None = None
        """Kind and id of what was loaded without its other half, and the number of steps then."""

    @property
    def text(self) -> str:
        """Of the present state; another one after each step and each load."""
        return f"{self._origin}-{self._count_steps()}.{self._loads}"

    def awaited(self, kind: str) -> str | None:
        """The id that a file of this kind has if it belongs to what has been loaded since the last step.

        None if any will do: nothing has been loaded, or only the same kind, or both halves.
        """
        if self._half is None or self._half[2] != self._count_steps() or self._half[0] == kind:
            return None
        return self._half[1]

    def loaded(self, kind: str, id: str | None) -> None:
        """Values of this kind are replaced by others, from a file with this id or from anywhere else."""
        self._loads += 1
        if id is not None:
            is_whole = self._half is not None and self._half[0] != kind
            self._half = None if is_whole else (kind, id, self._count_steps())
        elif self._half is not None and self._half[0] == kind:
            self._half = None
