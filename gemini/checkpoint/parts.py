"""``state_dict`` and ``load_state_dict`` of a part of a boosted model (``model.encoder.state_dict()``).

A part is a plain module: torch would copy from and into parameters whose chunk may be away. Hooks on each module that
has managed parameters put masters in the place of what torch reads, and bring what torch writes home.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gemini.chunk import MASTER, Chunk, ChunkManager

from ..torch_private import own_parameters
from ..units.attached import Attached
from ..updates.values import Values
from .names import are_objects_wanted
from .tensor_parallel import cut, gathered, whole_shape


def serve_parts(model: nn.Module, values: Values) -> list[RemovableHandle]:
    """Have every part of ``model`` gather from and load into the chunks, as the whole does, until its hooks go."""
    hooks = []
    for module in model.modules():
        if any(values.manager.find(p) is not None for p in own_parameters(module).values() if p is not None):
            loading = _Loading(values)
            hooks += [
                module.register_state_dict_post_hook(Attached(partial(_gather, values))),
                module.register_load_state_dict_pre_hook(Attached(loading.begin)),
                module.register_load_state_dict_post_hook(Attached(loading.end)),
            ]
    return hooks


def _gather(values: Values, module: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> None:
    if are_objects_wanted():  # the whole model, which reads each tied tensor once
        return
    for name, parameter in _managed(module, values.manager, state_dict, prefix).items():
        if state_dict[prefix + name] is not parameter:  # with keep_vars it is to be the parameter itself
            state_dict[prefix + name] = gathered(prefix + name, parameter, values.read(parameter, MASTER))


class _Loading:
    """Writes the masters, and keeps the chunks for torch's own copy, which then changes nothing.

    What torch finds wrong with names and shapes it reports as ever.
    """

    def __init__(self, values: Values) -> None:
        self._values = values
        self._manager = values.manager
        self._pinned: list[Chunk] = []

    def begin(self, module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        metadata["assign_to_params_buffers"] = False  # the parameter stays the one that the chunk knows
        for name, parameter in _managed(module, self._manager, state_dict, prefix).items():
            value = state_dict[prefix + name]
            if isinstance(value, Tensor) and value.shape == whole_shape(parameter):
                state_dict[prefix + name] = value = cut(parameter, value)  # torch has made a copy of the dict
                self._values.write(parameter, MASTER, value)
        for parameter in own_parameters(module).values():
            place = None if parameter is None else self._manager.find(parameter)
            if place is not None:
                self._keep(place[0])

    def _keep(self, chunk: Chunk) -> None:
        try:
            self._manager.fetch(chunk)
            self._manager.pin(chunk)
        except BaseException:  # torch goes no further, and never calls `end`
            self._release()
            raise
        self._pinned.append(chunk)

    def end(self, module: nn.Module, incompatible: Any) -> None:
        self._release()

    def _release(self) -> None:
        while self._pinned:
            self._pinned.pop().unpin()


def _managed(module: nn.Module, manager: ChunkManager, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The module's own managed parameters that ``state_dict`` has."""
    own = own_parameters(module).items()
    return {
        name: parameter
        for name, parameter in own
        if parameter is not None and prefix + name in state_dict and manager.find(parameter) is not None
    }
