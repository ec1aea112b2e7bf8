"""A save is of one moment: what another thread trains meanwhile would leave a checkpoint of no state at all.

A save that training waits for reads values for as long as it writes. It cannot keep another thread from training (that
one may hold what the save needs), so it looks before it commits whether a step has come in between. A save in the
background takes all of its values at once, and keeps steps away for that.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gemini.errors import CheckpointError

from ..step.managed_step import ChunkedStep
from .contents import Saving
from .stage import Stage
from .swapped import steps_of
from .together_saved import Listed


@dataclass(frozen=True, slots=True)
class Moment:
    """When the values of some models and optimizers are saved."""

    doing: str
    """What saves them, in words."""
    steps: tuple[ChunkedStep, ...]
    marks: tuple[object, ...]

    @classmethod
    def now(cls, doing: str, objects: Iterable[Any]) -> "Moment":
        """Now, or when the steps that other threads are in have ended."""
        steps = tuple({id(step): step for each in objects for step in steps_of(each)}.values())
        return cls(doing, steps, tuple(step.mark() for step in steps))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """No step is taken in here, if this is of one boosted model.

        Of several, a thread that trains may go from one to the next, and wait for this one for ever.
        """
        if len(self.steps) != 1:
            yield
            return
        with self.steps[0].lock:
            yield

    def check(self) -> None:
        """See whether values have been changed since.

        Raises
        ------
        CheckpointError
            If they have.
        """
        if tuple(step.mark() for step in self.steps) != self.marks:
            raise CheckpointError(
                f"{self.doing}: the model was trained, or loaded, by another thread while it was saved, so the files "
                "are of no single state. Nothing was committed, and what was there before is as it was: save on the "
                "thread that trains, or with use_async=True between two steps"
            )

    def checked(self, listed: Listed) -> Listed:
        """The same files, committed only if nothing has been changed until all are written."""

        def listed_and_checked(writers: Sequence[int]) -> Saving:
            saving = listed(writers)

            def commit(stage: Stage) -> None:
                self.check()
                saving.commit(stage)

            return replace(saving, commit=commit)

        return listed_and_checked
