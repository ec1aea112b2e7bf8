"""Which torch optimizers can run on pieces of chunks as they are, and what their states are called.

An optimizer is element-wise if what happens to an element depends on this element's values and on numbers that are the
same for all. Its own ``step`` then gives the same bits on any piece of a flat buffer, so nothing has to be written
again: the rule (`elementwise_rule`) hands it pieces.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from gemini.chunk import RESERVED

_TAKEN = ("step", *RESERVED)
"""What is kept beside the states goes by these names, in checkpoints and telemetry."""

Options = Mapping[str, Any]
"""The options of a parameter group."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One class of element-wise optimizers."""

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

    @property
    def name(self) -> str:
        return self.called or self.cls.__name__


def _sgd(options: Options) -> tuple[str, ...]:
    return ("momentum_buffer",) if options["momentum"] != 0 else ()


def _rmsprop(options: Options) -> tuple[str, ...]:
    wanted = {"square_avg": True, "momentum_buffer": options["momentum"] > 0, "grad_avg": options["centered"]}
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _adam(options: Options) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options["amsgrad"] else []))


def _always(*names: str) -> Callable[[Options], tuple[str, ...]]:
    return lambda options: names


_KINDS: dict[type[Optimizer], Kind] = {
    kind.cls: kind
    for kind in (
        Kind(torch.optim.SGD, _sgd, takes_step=False, keeps_state=lambda options: bool(options["momentum"] != 0)),
        Kind(
            torch.optim.Adagrad, _always("sum"), initial=lambda options: {"sum": options["initial_accumulator_value"]}
        ),
        Kind(torch.optim.RMSprop, _rmsprop),
        Kind(torch.optim.Adadelta, _always("square_avg", "acc_delta")),
        Kind(torch.optim.Adamax, _always("exp_avg", "exp_inf")),
        Kind(torch.optim.RAdam, _always("exp_avg", "exp_avg_sq")),
        Kind(torch.optim.Rprop, _always("prev", "step_size")),
    )
}
"""The classes that are accepted. For the whole process: `register_elementwise` adds one for all later boosts."""


def kind_of(optimizer: Optimizer) -> Kind | None:
    """What is known of an optimizer's class itself; a subclass may compute something else."""
    return _KINDS.get(type(optimizer))


def asks_for_torchs_own(optimizer: Optimizer) -> Kind | None:
    """An Adam with options that `HybridAdam`'s kernels do not have, and torch's own arithmetic has."""
    is_asked = any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups)
    return adam_kind(optimizer) if is_asked else None


def adam_kind(optimizer: Optimizer) -> Kind | None:
    """Torch's own Adam and AdamW; None of other optimizers."""
    is_adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return Kind(type(optimizer), _adam, called="Adam") if is_adam else None


def names() -> tuple[str, ...]:
    """The classes that are known."""
    return tuple(kind.name for kind in _KINDS.values())


def register_elementwise(
    cls: type[Optimizer], states: Iterable[str] | Callable[[Options], Iterable[str]], *, takes_step: bool = False
) -> None:
    """Let ``booster.boost`` accept an element-wise optimizer that is not one of torch's, such as Lion.

    Its own ``step`` is run on flat pieces of the parameters, in fp32, wherever these are. Whether it is element-wise is
    tried when it is boosted, with the options of each group: pieces must give the bits of the whole.

    Parameters
    ----------
    cls
        The optimizer's class. Subclasses are to be registered themselves.
    states
        The keys of its state whose tensors have the parameter's shape; a function of a group's options where that
        depends on them. They are made by its ``step`` when a parameter has no state.
    takes_step
        Its state has a ``step``, a count or a scalar tensor, that begins with 0 and grows by 1. Other numbers that are
        kept from step to step, in the state or in the group, are not supported.

    Raises
    ------
    TypeError
        If ``cls`` is no class of optimizers, or ``states`` is a single string.
    ValueError
        If it has been registered, or has a state by a name that means something else.

    Examples
    --------
    >>> register_elementwise(Lion, ["exp_avg"])
    >>> model, optimizer, *_ = booster.boost(model, Lion(model.parameters(), lr=1e-4))
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"expected a class of torch.optim.Optimizer, got {cls!r}")
    if cls in _KINDS or cls in (torch.optim.Adam, torch.optim.AdamW):
        raise ValueError(f"{cls.__name__} is known already")
    if callable(states):
        of_options = states
        _KINDS[cls] = Kind(cls, lambda options: _free_names(cls, of_options(options)), takes_step)
        return
    if isinstance(states, str):
        raise TypeError(f"states of {cls.__name__}: give a sequence of names, got {states!r}")
    _KINDS[cls] = Kind(cls, _always(*_free_names(cls, states)), takes_step)


def _free_names(cls: type[Optimizer], states: Iterable[str]) -> tuple[str, ...]:
    names = tuple(states)
    if taken := [name for name in names if name in _TAKEN]:
        raise ValueError(f"a state of {cls.__name__} cannot be called {taken[0]!r}, which means something else here")
    return names
