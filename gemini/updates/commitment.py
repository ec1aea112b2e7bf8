"""What has begun and cannot be undone is completed, also where there is no memory for small objects of Python's own.

Such an allocation fails at any instruction, and rarely twice: Python has freed something by then. So the parts of a
step that come after the first update was handed over are written so that they can be repeated, and are.
"""

from collections.abc import Callable
from typing import TypeVar

from ..errors import TornStep, is_out_of_memory

T = TypeVar("T")
ATTEMPTS = 8


def surely(action: Callable[..., T], *args: object) -> T:
    """Do what has to be done, again if memory has run out within. To do it twice must do no harm.

    Raises
    ------
    TornStep
        If it runs out each time.
    """
    attempts = ATTEMPTS
    while True:
        try:
            return action(*args)
        except Exception as error:
            attempts -= 1
            if attempts and is_out_of_memory(error):
                continue
            if not is_out_of_memory(error):
                raise
            raise TornStep(
                f"memory ran out {ATTEMPTS} times ({error!r}) while a step that had begun was being completed, so "
                "parameters and optimizer states may be of no single step: load a checkpoint, booster.load_model and "
                "booster.load_optimizer, with more memory left beside model data"
            ) from error
