"""Hooks that stay with the model that they were installed for."""

from collections.abc import Callable
from functools import partial
from typing import Any


class Attached(partial[Any]):
    """A hook on a module of a boosted model. In a copy of the module, deep or pickled, it is one that does nothing.

    The copy of a part is a plain module with values of its own; a copied hook would copy the model's side of it, too.
    """

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return detached

    def __reduce__(self) -> Any:
        return _none, ()


def _none() -> Callable[..., None]:
    return detached


def detached(*args: Any, **kwargs: Any) -> None:
    """The hook in a copy: does nothing."""
