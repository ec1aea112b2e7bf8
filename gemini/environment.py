"""Whole numbers in environment variables, which launchers and users set. Needs no torch."""

import os
from collections.abc import Mapping


def whole_number(name: str, default: int | None = None, *, environment: Mapping[str, str] | None = None) -> int | None:
    """The number in a variable; the default where it is not set, or empty.

    Parameters
    ----------
    environment
        By default that of the process, as it is now.

    Raises
    ------
    ValueError
        If it is no whole number; names the variable.
    """
    text = (os.environ if environment is None else environment).get(name, "")
    if not text.strip():
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name} must be a whole number, got {text!r}") from None


def number_of_ranks(name: str) -> int:
    """How many ranks a variable says that there are: 1 where it is not set, and never less.

    Raises
    ------
    ValueError
        As `whole_number`.
    """
    return max(1, whole_number(name) or 1)
