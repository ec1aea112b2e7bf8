"""What one call of a module made of the autograd graph, and by which of its nodes backward begins and ends there.

A thread numbers the nodes that it makes, so a call's own are those between two numbers. Where every one of them can be
reached from its results, nothing of the call is hidden (in a list of somebody else, say), and backward is through with
it when those have run that no other of them follows::

    inputs          the call's own nodes               results
    MulBackward <-- ViewBackward* <-- AddmmBackward <-- ViewBackward      * the last ones
    AccumulateGrad (weight) <-- TBackward* <-'
"""

from collections.abc import Collection, Container, Iterable
from typing import Any

from torch import Tensor

from ..torch_private import base_of, number_of

MOST_NODES = 64
"""Looking at a node costs a microsecond or two. Layers with parameters of their own have a handful."""
_NO_NUMBER = (1 << 64) - 1
"""Of nodes that put gradients into parameters."""


def first_nodes(results: Iterable[Tensor], inputs: Collection[Any], own: range) -> set[Any]:
    """By which backward can come to a call.

    Parameters
    ----------
    results
        Whatever of the call the rest of the program can go on with.
    inputs
        The nodes of its inputs as they were before; a result that has one of these was passed on.
    own
        The numbers of what it made.
    """
    found = set()
    for tensor in results:
        node = tensor.grad_fn
        if node is None:
            continue
        if node not in inputs:
            found.add(node)
        base = base_of(tensor)
        # If a view is changed in place later, its node goes, and backward comes by the node of what it is a view of.
        if base is not None and base.grad_fn is not None and number_of(base.grad_fn) in own:
            found.add(base.grad_fn)
    return found


def unreachable(tensors: Iterable[Tensor], first: Collection[Any], own: range) -> set[Any]:
    """The nodes of those of ``tensors`` that a call made (see ``own``) and to which ``first`` does not lead."""
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


def last_nodes(first: Collection[Any], inputs: Container[Any], own: range) -> list[Any]:
    """By which backward leaves a call: when these have run, all of its nodes have.

    Empty where that is not known: the call made too many nodes, some of them cannot be reached from ``first`` (or are
    gone), or one leads to what is neither an input nor a parameter.
    """
    if not 0 < len(own) <= MOST_NODES or any(number_of(node) not in own for node in first):
        return []
    found, last, ahead = set(first), [], list(first)
    while ahead:
        node = ahead.pop()
        is_last = True
        for following, _ in node.next_functions:
            if following is None or following in inputs:
                continue
            number = number_of(following)
            if number in own:
                is_last = False
                if following not in found:
                    found.add(following)
                    ahead.append(following)
            elif number != _NO_NUMBER:
                return []
        if is_last:
            last.append(node)
    return last if len(found) == len(own) else []
