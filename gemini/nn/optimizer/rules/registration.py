"""Having ``booster.boost`` accept optimizers that it does not know."""

from collections.abc import Callable, Iterable, Mapping

from torch.optim import Optimizer

from gemini.chunk import RESERVED

from . import elementwise, whole
from .kind import Kind, Options, Shape, always

_TAKEN = ("step", *RESERVED)
"""What is kept beside the states goes by these names, in checkpoints and telemetry."""


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
    elementwise.add(Kind(cls, _checked_states(cls, states), takes_step))


def register_whole_parameter(
    cls: type[Optimizer],
    states: Iterable[str] | Callable[[Options], Iterable[str]],
    *,
    takes_step: bool = False,
    side: Callable[[Shape], Mapping[str, Shape]] | None = None,
) -> None:
    """Let ``booster.boost`` accept an optimizer that looks at whole parameters, one at a time.

    Its own ``step`` is run on each parameter alone, in fp32, in its shape. One that looks at several parameters at once
    (LBFGS, a norm of all gradients) computes something else then. So do those that keep anything but what is said here,
    in the state, in the group or in themselves: a few steps of small tensors are compared when it is boosted.

    Parameters
    ----------
    cls
        The optimizer's class. Subclasses are to be registered themselves.
    states
        The keys of its state whose tensors have the parameter's shape, which live in chunks; a function of a group's
        options where that depends on them.
    takes_step
        Its state has a ``step``, a count or a scalar tensor, that begins with 0 and grows by 1.
    side
        From a parameter's shape to the shapes of all other tensors in its state. They stay in RAM, uncounted.

    Raises
    ------
    TypeError
        If ``cls`` is no class of optimizers, or ``states`` is a single string.
    ValueError
        If it is known already.

    Examples
    --------
    >>> register_whole_parameter(Muon, ["momentum_buffer"])
    """
    of_options = _checked_states(cls, states)
    kept = (lambda shape: {}) if side is None else side
    whole.add(Kind(cls, of_options, takes_step, side=kept, is_whole=True))


def _checked_states(
    cls: type[Optimizer], states: Iterable[str] | Callable[[Options], Iterable[str]]
) -> Callable[[Options], tuple[str, ...]]:
    """From the options of a group to the names of states, none of which means something else here."""
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"expected a class of torch.optim.Optimizer, got {cls!r}")
    if elementwise.is_known(cls):
        raise ValueError(f"{cls.__name__} is known already")
    if callable(states):
        of_options = states
        return lambda options: _free_names(cls, of_options(options))
    if isinstance(states, str):
        raise TypeError(f"states of {cls.__name__}: give a sequence of names, got {states!r}")
    return always(*_free_names(cls, states))


def _free_names(cls: type[Optimizer], states: Iterable[str]) -> tuple[str, ...]:
    names = tuple(states)
    if taken := [name for name in names if name in _TAKEN]:
        raise ValueError(f"a state of {cls.__name__} cannot be called {taken[0]!r}, which means something else here")
    return names
