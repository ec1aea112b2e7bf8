"""Tensors in ``p.grad`` that are the gradient as long as somebody holds them."""

import sys
from weakref import ref

from torch import Tensor

from ..chunk import QUIET
from ..torch_private import storage_uses

_OWN_USES = 2
"""Of the memory of a gradient that nobody else has: the tensor, and the storage object that is asked."""


def references(parameter: Tensor) -> int:
    """Python's references to ``p.grad``: more than when it was put there, and somebody holds it."""
    with QUIET():
        gradient = parameter.grad
    return sys.getrefcount(gradient)


def is_shared_memory(gradient: Tensor) -> bool:
    """True if another tensor lies over the memory of a gradient."""
    return storage_uses(gradient.untyped_storage()) > _OWN_USES


def is_held(parameter: Tensor, unheld: int) -> bool:
    """True if somebody holds ``p.grad``, or its memory; ``unheld`` is how many `references` it has otherwise."""
    if references(parameter) > unheld:
        return True
    with QUIET():
        gradient = parameter.grad
    return gradient is not None and is_shared_memory(gradient)


class KeptForHolders:
    """The tensor that was in ``p.grad`` when it was read into a chunk, which is to be there again after the step.

    Parameters
    ----------
    tensor
        That tensor.
    is_theirs
        The user has put it there, so it is kept. Otherwise it lasts as long as somebody else has it.
    is_copy
        We have made it, for somebody who asked for ``p.grad``.
    has_alias
        Another tensor lay over its memory, so it lasts as long as that does, too.
    """

    __slots__ = ("_tensor", "is_copy", "is_theirs")

    def __init__(self, tensor: Tensor, is_theirs: bool, is_copy: bool, has_alias: bool) -> None:
        self.is_theirs = is_theirs
        self.is_copy = is_copy
        self._tensor: Tensor | ref[Tensor] = tensor if is_theirs or has_alias else ref(tensor)

    @property
    def tensor(self) -> Tensor | None:
        """The tensor, as long as it is to be there again."""
        if isinstance(self._tensor, ref):
            return self._tensor()
        if not self.is_theirs and not is_shared_memory(self._tensor):
            self._tensor = ref(self._tensor)  # the last holder of its memory has gone; of the tensor there may be some
            return self._tensor()
        return self._tensor
