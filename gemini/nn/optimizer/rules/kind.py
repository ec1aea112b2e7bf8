"""What is known of a class of optimizers that run as they are on what is in chunks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

Options = Mapping[str, Any]
"""The options of a parameter group."""
Shape = tuple[int, ...]


def _nothing(shape: Shape) -> Mapping[str, Shape]:
    return {}


LOOK_AT_WHOLE_TENSORS = frozenset(
    {
        *("adanorm", "caution", "cautious", "clip_threshold", "clipping_threshold", "max_grad_norm", "restart_cond"),
        *("adagc", "agc", "fixed_norm", "trust_ratio", "use_gc", "use_orthograd"),
    }
)
"""Options of other people's optimizers with which the update of an element depends on others, also of a group alone."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One class of optimizers."""

    cls: type[Optimizer]
    states: Callable[[Options], tuple[str, ...]]
    """From the options of a group to the states that hold one value for each element, as its state dict calls them."""
    takes_step: bool = True
    """Whether its state has a ``step``."""
    initial: Callable[[Options], Mapping[str, float]] | None = None
    """From the constructor's arguments to what the states hold before the first step; None: there are none before."""
    keeps_state: Callable[[Options], bool] = lambda options: True
    """Whether a step with these options leaves a state."""
    called: str | None = None
    """By checkpoints and messages, where that is not the name of the class."""
    side: Callable[[Shape], Mapping[str, Shape]] = _nothing
    """From a parameter's shape to the shapes of the states that are kept beside its elements. Of an element-wise
    optimizer these are numbers that do not depend on the elements."""
    counts_in_group: bool = False
    """Whether it counts its steps as the ``step`` of each group."""
    is_whole: bool = False
    """Whether it looks at whole parameters, and is no element-wise optimizer."""
    options: tuple[str, ...] | None = None
    """Of the constructor's arguments those that may be on; None: all."""

    @property
    def name(self) -> str:
        return self.called or self.cls.__name__


def always(*names: str) -> Callable[[Options], tuple[str, ...]]:
    """States that do not depend on options."""
    return lambda options: names
