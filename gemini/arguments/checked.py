"""A function whose arguments pass a table of rules before it begins.

The message of an error has always the same parts: the argument as the user wrote it, what is allowed, what came.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

from .brief import brief

P = ParamSpec("P")
R = TypeVar("R")


class NotAllowed(Exception):
    """A value does not pass a rule.

    Parameters
    ----------
    kind
        The error that the user gets.
    but
        What is wrong beyond what the rule says, as the end of a sentence that says what came.
    """

    def __init__(self, kind: type[TypeError] | type[ValueError], but: str = "") -> None:
        super().__init__(but)
        self.kind = kind
        self.but = but


class Rule(Protocol):
    """What one argument may be."""

    @property
    def allowed(self) -> str:
        """As the end of a sentence that begins with "NAME must be"."""

    def meant(self, value: Any) -> Any:
        """The value as the function works with it.

        Raises
        ------
        NotAllowed
            If it is none.
        """


Table: TypeAlias = Mapping[str, Rule]
"""A rule for each argument of a function, by its name."""


def accepted(name: str, rule: Rule, value: Any) -> Any:
    """What a value means.

    Raises
    ------
    ValueError, TypeError
        With the argument's name, if it does not pass the rule.
    """
    try:
        return rule.meant(value)
    except NotAllowed as error:
        kind, but = error.kind, error.but
    of = f" of type {type(value).__name__}" if kind is TypeError and value is not None else ""
    raise kind(f"{name} must be {rule.allowed}, got {brief(value)}{of}{but}")


def check(table: Table, given: Mapping[str, Any]) -> dict[str, Any]:
    """What all values mean; those without a rule mean themselves. Raises as `accepted`."""
    return {name: accepted(name, table[name], value) if name in table else value for name, value in given.items()}


def checked(table: Table) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function is called with what its arguments mean, or not at all.

    Defaults are not looked at.

    Raises
    ------
    TypeError
        If the table is not that of the function's arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = {name for name, each in signature.parameters.items() if each.kind not in kinds} - {"self", "cls"}
        if names ^ set(table):
            raise TypeError(f"{function.__qualname__} and its rules differ in {sorted(names ^ set(table))}")

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python's own error names the function
            bound.arguments.update(check(table, bound.arguments))
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate
