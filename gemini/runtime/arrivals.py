"""From autograd's gradients to the engine.

Hooks on parameters live in C++, through which the garbage collector does not see, and the engine has the parameters:
they hold it weakly.
"""

from collections.abc import Sequence
from functools import partial
from weakref import ref

from torch import Tensor

from ..engine import Engine
from ..torch_private import TENSOR_HOOKS


class _Watching(partial[None]):
    """A hook of ours."""


def watch_gradients(engine: Engine, parameters: Sequence[Tensor]) -> None:
    """Have the gradients of these parameters go into their chunks, if these have room for them."""
    itself = ref(engine)
    for parameter in engine.updates.follow(parameters):
        parameter.register_post_accumulate_grad_hook(_Watching(_arrived, itself))
        if engine.updates.gradients.slot(parameter).stand_in is not None:
            parameter.register_hook(_Watching(_arriving, itself, ref(parameter)))


def unwatch_gradients(parameter: Tensor) -> None:
    """Take off a parameter what `watch_gradients` has put on it."""
    for name in TENSOR_HOOKS:
        hooks = getattr(parameter, name, None) or {}
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Watching)]:
            del hooks[key]


def _arrived(reference: "ref[Engine]", parameter: Tensor) -> None:
    engine = reference()
    if engine is not None:
        engine.gradient_arrived(parameter)


def _arriving(reference: "ref[Engine]", of: "ref[Tensor]", gradient: Tensor) -> None:
    engine, parameter = reference(), of()
    if engine is not None and parameter is not None:
        engine.updates.gradients.slot(parameter).make_way()
