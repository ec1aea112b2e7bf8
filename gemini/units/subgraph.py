"""The autograd nodes that one call of a module made, and those by which backward enters the call.

A thread numbers the nodes that it makes, so a call's own are those between two numbers. Where every one of them can be
reached from its results, nothing of the call is hidden (in a list of auxiliary losses, say)::

    inputs          the call's own nodes              results
    MulBackward <-- ViewBackward <-- AddmmBackward <-- ViewBackward
    AccumulateGrad (weight) <-- TBackward <-'
"""

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..torch_private import base_of, number_of

MOST_NODES = 64
"""Looking at a node costs a microsecond or two. Layers with parameters of their own have a handful."""


def first_nodes(results: Iterable[Tensor], inputs: Collection[Any], own: range) -> tuple[set[Any], set[Any]]:
    """The nodes of a call's results, and those by which backward can enter it.

    If a view is changed in place later its node goes, and backward enters by the node of its base, if the call made
    that. It may do so in any case where nothing lies between: a view's node reads no parameter, unless it is that of a
    ``torch.autograd.Function``.

    Parameters
    ----------
    results
        Tensors of the call that the rest of the program can reach.
    inputs
        The nodes of the inputs before the call; a result that has one of these is an input that was passed on.
    own
        The numbers of the nodes that the call made.
    """
    found, entries = set(), set()
    for tensor in results:
        node: Any = tensor.grad_fn
        if node is None:
            continue
        base = base_of(tensor)
        of_base = None if base is None else base.grad_fn
        has_base = of_base is not None and number_of(of_base) in own
        if has_base:
            found.add(of_base)
            entries.add(of_base)
        if node not in inputs:
            found.add(node)
            if not has_base or node.next_functions[0][0] is not of_base or isinstance(node, BackwardCFunction):
                entries.add(node)
    return found, entries


def unreachable(tensors: Iterable[Tensor], first: Collection[Any], own: range) -> set[Any]:
    """The nodes of ``tensors`` that are among the call's own and cannot be reached from ``first``."""
    found = {node for node in (t.grad_fn for t in tensors) if node is not None and number_of(node) in own}
    if found:
        reached = set(first)
        ahead = list(first)
        while ahead:
            for following, _ in ahead.pop().next_functions:
                if following is not None and following not in reached and number_of(following) in own:
                    reached.add(following)
                    ahead.append(following)
        found -= reached
    return found


def is_contained(first: Collection[Any], own: range, most: int = MOST_NODES) -> bool:
    """True if all nodes that a call made can be reached from the nodes by which backward can enter it.

    False also where that is not known: the call made more nodes than ``most``, or is entered by those of others.
    """
    if not 0 < len(own) <= most:
        return False
    for node in first:
        if number_of(node) not in own:
            return False
    found, ahead = set(first), list(first)
    while ahead:
        for following, _ in ahead.pop().next_functions:
            if following is not None and following not in found and number_of(following) in own:
                found.add(following)
                ahead.append(following)
    return len(found) == len(own)
