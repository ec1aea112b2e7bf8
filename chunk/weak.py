"""Callbacks that do not keep alive whom they call."""

import weakref
from collections.abc import Callable
from typing import ParamSpec

_Arguments = ParamSpec("_Arguments")


def weakly(method: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """A bound method without a hold on its object; once that is gone, nothing is called.

    For what is registered with something that outlives the model for a while (the manager is held until it has been
    closed), or that would close a cycle: memory in a cycle waits for the garbage collector.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        target = reference()
        if target is not None:
            target(*args, **kwargs)

    return call
