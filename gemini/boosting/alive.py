"""The boosted models of this process that are alive: who has a parameter, what is settled before a fork and an exit.

Weakly, so that nothing here keeps a model alive.
"""

import weakref
from collections.abc import Iterator

from torch import Tensor

from ..chunk import ChunkManager
from ..process_wide import before_fork, before_threads_end

_managers: "weakref.WeakSet[ChunkManager]" = weakref.WeakSet()


def enrol(manager: ChunkManager) -> None:
    """Count this one among those that are alive."""
    _managers.add(manager)


def dismiss(manager: ChunkManager) -> None:
    """Count this one no longer: its model is gone, and ids of its parameters may be those of others."""
    _managers.discard(manager)


def managers() -> Iterator[ChunkManager]:
    """The managers of all models that are alive."""
    return iter(list(_managers))


def ram_of_others(manager: ChunkManager) -> int:
    """Bytes of RAM that the model data of all other models take."""
    return sum(other.ledger.ram_bytes for other in managers() if other is not manager)


def is_managed(parameter: Tensor) -> bool:
    """True if a parameter lives in the chunks of any boosted model."""
    return any(manager.find(parameter) is not None for manager in managers())


_REST_SECONDS = 60.0
"""The longest that a fork waits. The child may not use the model in any case."""


def _come_to_rest() -> None:
    """Let what is under way end, so that a child gets whole values, and no lock that is held by a thread it lacks."""
    for manager in managers():
        manager.come_to_rest(_REST_SECONDS)


before_fork(_come_to_rest)


def _finish_saves() -> None:
    """Let saves that are under way be finished before the interpreter ends."""
    for manager in managers():
        manager.snapshots.close()


before_threads_end(_finish_saves)
