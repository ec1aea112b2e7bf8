"""The blocks of a model: the parts that repeat, by which activations are kept, moved or computed again.

A block is large enough that its inputs are small beside what it saves, and small enough that one of them fits beside
the inputs of all others: a transformer's layer. Models differ in how they name them, so they are found by structure.
"""

from collections import Counter
from collections.abc import Iterator

from torch import nn

from ..torch_private import is_compiled

FEW = 4
"""Modules of one kind, up to this number, may be stages, each with the blocks in it."""


def blocks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """The outermost modules of a model that repeat, in the order of its modules.

    Modules repeat if a module around them has several of one class; those without parts of their own (a linear layer)
    or without parameters are no blocks: there is nothing to gain from running them again. A few that have lists of
    repeated modules in them are stages, and these are the blocks.
    """
    return tuple(dict.fromkeys(_within(model)))


def _within(module: nn.Module) -> Iterator[nn.Module]:
    if is_compiled(module):
        return
    counts = Counter(type(child) for child in module.children() if _is_composite(child))
    for child in module.children():
        if counts[type(child)] < 2 or not _is_composite(child):
            yield from _within(child)
        elif counts[type(child)] <= FEW and (inner := _listed_in(child)):
            yield from inner
        else:
            yield child


def _listed_in(stage: nn.Module) -> list[nn.Module]:
    """The blocks of a stage: what repeats in one of its lists, or in itself if it is one."""
    if is_compiled(stage):
        return []
    lists = [stage, *stage.children()]
    return [block for each in lists if isinstance(each, nn.ModuleList | nn.Sequential) for block in _repeated(each)]


def _repeated(modules: nn.Module) -> list[nn.Module]:
    composites = [child for child in modules.children() if _is_composite(child)]
    return composites if len({type(child) for child in composites}) == 1 < len(composites) else []


def _is_composite(module: nn.Module) -> bool:
    has_parts = is_compiled(module) or any(True for _ in module.children())
    return has_parts and any(True for _ in module.parameters())
