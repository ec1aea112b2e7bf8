"""What watches the forward under way for uses of parameters and results that hooks do not show."""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..units.observer import Observer
from ..units.results import Results
from ..units.units import Visit

Kind = tuple[bool, bool]
"""Of a forward: with gradients, in training mode."""


@dataclass(slots=True, eq=False)
class Discovery:
    """The modes that are on, and which kinds of forward have been watched.

    A forward of each kind is watched as a whole, by an observer. Later ones are so again when something was seen that
    no forward had shown. The results of a single unit are watched where it is new or leaks some of its graph.
    """

    observer: Observer | None = None
    """Watches the model's forward under way."""
    results: Results | None = None
    """Sees what is made: the observer, or what watches a single unit."""
    foreign: dict[nn.Module, Visit] = field(default_factory=dict)
    """Modules that turned out to use parameters of others while they ran, without hooks of ours yet."""
    _watched: set[Kind] = field(default_factory=set)
    _asked_for: set[int] = field(default_factory=set)
    """ids of parameters for which the observer has been called again."""

    def has_watched(self, kind: Kind) -> bool:
        """True if a forward of this kind need not be watched."""
        return kind in self._watched

    def begin(self, observer: Observer) -> None:
        """Watch the model's forward."""
        self.observer = observer
        self.results = observer.__enter__()

    def end(self, kind: Kind | None) -> None:
        """Watch no longer; ``kind`` is that of the forward, None if an exception ended it."""
        self.observer = None
        self.stop_watching()
        if kind is not None:
            self._watched.add(kind)

    def watch(self) -> Results:
        """Watch the results of a unit that is about to run."""
        self.results = Results().__enter__()
        return self.results

    def stop_watching(self) -> None:
        """End the mode that is on, if any."""
        if self.results is not None:
            results, self.results = self.results, None
            results.__exit__(None, None, None)

    def stop(self) -> None:
        """What was watched has been given up."""
        self.observer = None
        self.stop_watching()
        self.foreign.clear()

    def watch_again(self) -> None:
        """Watch the next forward of each kind once more."""
        self._watched.clear()

    def ask_for(self, parameters: Collection[Tensor]) -> None:
        """Parameters were used in a unit that does not bracket them: watch again, once, to learn by which module."""
        unknown = {id(parameter) for parameter in parameters} - self._asked_for
        if unknown and self.observer is None:
            self._asked_for |= unknown
            self.watch_again()
