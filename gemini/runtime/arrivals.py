"""From autograd's gradients to the runtime.

Hooks on parameters live in C++, through which the garbage collector does not see, and the runtime has the parameters:
they hold it weakly.
"""

from collections.abc import Sequence
from functools import partial
from weakref import ref

from torch import Tensor

from .runtime import Runtime


def watch_gradients(runtime: Runtime, parameters: Sequence[Tensor]) -> None:
    """Have the gradients of these parameters go into their chunks, if these have room for them."""
    itself = ref(runtime)
    for parameter in runtime.updates.follow(parameters):
        parameter.register_post_accumulate_grad_hook(partial(_arrived, itself))
        if runtime.updates.gradients.has_stand_in(parameter):
            parameter.register_hook(partial(_arriving, itself, ref(parameter)))


def _arrived(reference: "ref[Runtime]", parameter: Tensor) -> None:
    runtime = reference()
    if runtime is not None:
        runtime.gradient_arrived(parameter)


def _arriving(reference: "ref[Runtime]", of: "ref[Tensor]", gradient: Tensor) -> None:
    runtime, parameter = reference(), of()
    if runtime is not None and parameter is not None:
        runtime.updates.gradients.make_way(parameter)
