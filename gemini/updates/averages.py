"""Running averages of masters, which follow them in each update: where their numbers come from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..chunk import Chunk

PIECE_NUMEL = 1 << 18
"""Elements that are averaged at once: what that allocates is small, and the masters are still in the cache."""


class Form(Protocol):
    """How an average goes on."""

    kind: ClassVar[str]
    """The public class of such an average."""

    @property
    def options(self) -> Mapping[str, float]:
        """What this class was given."""

    def apply(self, average: Tensor, values: Tensor, count: int) -> None:
        """Take in ``values`` after ``count`` others (1 or more). All are float32 and flat; ``average`` is written.

        Whatever may be raised is raised before that.
        """


@dataclass(frozen=True, slots=True)
class Exponential:
    """``average.lerp_(values, 1 - decay)``, as `torch.optim.swa_utils.get_ema_multi_avg_fn` has it."""

    kind: ClassVar[str] = "EMA"
    decay: float

    @property
    def options(self) -> Mapping[str, float]:
        return {"decay": float(self.decay)}

    def apply(self, average: Tensor, values: Tensor, count: int) -> None:
        average.lerp_(values, 1 - self.decay)


@dataclass(frozen=True, slots=True)
class Equal:
    """``average + (values - average) / (count + 1)``, as `torch.optim.swa_utils.get_swa_avg_fn` has it."""

    kind: ClassVar[str] = "SWA"

    @property
    def options(self) -> Mapping[str, float]:
        return {}

    def apply(self, average: Tensor, values: Tensor, count: int) -> None:
        average.add_((values - average).div_(count + 1))


@dataclass(frozen=True, slots=True)
class BoundAverage:
    """What one step does to an average."""

    form: Form
    count: int

    def apply(self, average: Tensor, values: Tensor) -> None:
        """Take in the values after the step, from wherever they are. The first ones are copied."""
        if self.count:
            self.form.apply(average, values.to(average.device), self.count)
        else:
            average.copy_(values)


@dataclass(slots=True, eq=False)
class Average:
    """One average of all parameters.

    Parameters
    ----------
    name
        Of its buffers in chunks.
    """

    name: str
    form: Form
    plain: Mapping[Tensor, Tensor] = field(default_factory=dict)
    """Of parameters that are in no chunk."""
    count: int = 0
    """How many steps it has taken in."""
    is_swapped: bool = False
    """The parameters have the average's values, and it has theirs."""

    def bind(self) -> BoundAverage:
        """The next step."""
        return BoundAverage(self.form, self.count)

    def stepped(self) -> None:
        """A step is over, or has been started: take in what is in no chunk, and count."""
        bound = self.bind()
        with torch.no_grad():
            for parameter, average in self.plain.items():
                bound.apply(average, parameter.detach())
        self.count += 1

    def restore(self, count: int) -> None:
        """Go on as after ``count`` steps."""
        self.count = count

    def swap(self) -> None:
        """Note that parameters and average have each other's values, or their own again."""
        self.is_swapped = not self.is_swapped


class Averages:
    """The averages that follow a model."""

    def __init__(self) -> None:
        self._all: dict[str, Average] = {}

    def __iter__(self) -> Iterator[Average]:
        return iter(self._all.values())

    def __contains__(self, average: Average) -> bool:
        return self._all.get(average.name) is average

    def add(self, average: Average) -> None:
        self._all[average.name] = average

    def remove(self, average: Average) -> None:
        del self._all[average.name]

    def of(self, chunk: Chunk) -> dict[str, BoundAverage]:
        """What the next step does in a chunk, by the names of buffers."""
        return {spec.name: self._all[spec.name].bind() for spec in chunk.plan.averages}

    def stepped(self) -> None:
        """See `Average.stepped`."""
        for average in self:
            average.stepped()

    def refuse_swapped(self, doing: str) -> None:
        """Raise while parameters have the values of an average."""
        if any(average.is_swapped for average in self):
            raise RuntimeError(
                f"cannot {doing} while the parameters have the values of their average: leave ema.swapped_in() first"
            )


class _Unchanged:
    """The update of parameters without a gradient, whose averages go on (a `BoundUpdate`)."""

    def apply(self, param: Tensor, states: Sequence[Tensor], grad: Tensor, out: Tensor | None = None) -> None:
        pass

    def atomic_numel(self, device: torch.device) -> int | None:
        return None


UNCHANGED = _Unchanged()
