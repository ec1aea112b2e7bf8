"""From autograd's gradients to the engine.

Hooks on parameters live in C++, through which the garbage collector does not see, and the engine has the parameters:
they hold it weakly.
"""

from collections.abc import Sequence
from weakref import ref

from torch import Tensor

from ..engine import Engine
from ..signals import uninterrupted
from ..torch_private import TENSOR_HOOKS
from ..updates.gradient_slot import Watching


def watch_gradients(engine: Engine, parameters: Sequence[Tensor]) -> None:
    """Have the gradients of these parameters go into their chunks, if these have room for them."""
    itself = ref(engine)
    for parameter in engine.updates.follow(parameters):
        parameter.register_post_accumulate_grad_hook(Watching(_arrived, itself))


def unwatch_gradients(parameter: Tensor) -> None:
    """Take off a parameter what `watch_gradients` has put on it."""
    for name in TENSOR_HOOKS:
        hooks = getattr(parameter, name, None) or {}
        for key in [key for key, hook in hooks.items() if isinstance(hook, Watching)]:
            del hooks[key]


@uninterrupted
def _arrived(reference: "ref[Engine]", parameter: Tensor) -> None:
    engine = reference()
    if engine is not None:
        engine.gradient_arrived(parameter)
