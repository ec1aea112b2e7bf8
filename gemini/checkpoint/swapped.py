"""Models whose parameters have the values of a running average: what is loaded then would change places with these."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..boosted import boosted, is_boosted
from ..step.managed_step import ChunkedStep


def refuse_swapped(doing: str, *objects: Any) -> None:
    """Raise if something is about to be loaded into one of these models, or an optimizer of one, within a swap.

    Raises
    ------
    RuntimeError
        While the parameters have the values of their average.
    """
    for each in objects:
        for step in steps_of(each):
            step.averages.refuse_swapped(doing)


def steps_of(of: Any) -> Iterator[ChunkedStep]:
    """The steps of the boosted models in a model, or that of an optimizer or its scheduler; none of anything else."""
    if isinstance(of, nn.Module):
        yield from (boosted(module).step for module in of.modules() if is_boosted(module))
    elif isinstance(step := getattr(getattr(of, "optimizer", of), "_managed", None), ChunkedStep):
        yield step
