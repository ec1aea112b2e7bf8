"""Which modules to bracket: the coarsest ones whose chunks fit on DEVICE together. Pure: no torch, no hooks.

A visit costs tens of microseconds, whatever it brings. Where the chunks of a whole block, or of the whole model, can be
on DEVICE at once, one visit of it brings what a visit of each layer in it would::

    model             768 bytes      budget 768: {model: embedding, q, v, norm}
      embedding       256
      block           512            budget 512: {block: q, v, norm}; the embedding stays a unit by itself
        q, v          192 each
        norm          128
"""

from collections.abc import Hashable, Mapping, Set
from typing import TypeVar

Module = TypeVar("Module", bound=Hashable)


def coarsest(
    within: Mapping[int, Set[Module]],
    chunks: Mapping[int, Set[int]],
    nbytes: Mapping[int, int],
    budget_bytes: int,
) -> dict[Module, frozenset[int]]:
    """Choose the modules that bracket several units.

    Parameters
    ----------
    within
        By unit: the modules that ran around each of its calls, itself among them. Units that are left out stay.
    chunks, nbytes
        By unit: its chunks. By chunk: the bytes of its full copy; those left out take none.
    budget_bytes
        What the chunks of one visit may take together.

    Returns
    -------
    dict
        The units that each chosen module stands for: two or more, and none in two modules.
    """
    parts: dict[Module, set[int]] = {}
    for unit, modules in within.items():
        for module in modules:
            parts.setdefault(module, set()).add(unit)
    chosen: dict[Module, frozenset[int]] = {}
    covered: set[int] = set()
    for module, units in sorted(parts.items(), key=lambda item: -len(item[1])):
        if len(units) < 2 or units & covered:
            continue
        together = set().union(*(chunks[unit] for unit in units))
        if sum(nbytes.get(chunk, 0) for chunk in together) <= budget_bytes:
            chosen[module] = frozenset(units)
            covered |= units
    return chosen
