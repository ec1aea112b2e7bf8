"""A module's parameters, telling when one is asked for that no unit has brought.

``module.weight`` looks in ``module._parameters``. While a unit runs its parameters are pinned and nothing is told; what
is left are the uses that nobody brackets: code that calls ``forward`` or another method directly, a penalty on a
weight, another module's weight that is used in some steps only. Each of those would read NaN.
"""

import dis
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

from ..chunk import Chunk
from .observer import DESCRIBING

Key = str
OnUse = Callable[[nn.Parameter, Chunk], None]


class WatchedParameters(dict[Key, Any]):
    """Takes the place of ``module._parameters``.

    Parameters
    ----------
    parameters
        What the module has.
    chunks
        Where those are that are managed.
    on_use
        Called with a parameter and its chunk when its values may be used while nothing pins it.
    is_use
        Says whether going through all parameters (`nn.Module.parameters`) is a use just now: mostly it is not, but for
        a count, a name, a dtype.
    """

    def __init__(
        self,
        parameters: Mapping[Key, Any],
        chunks: Mapping[Key, Chunk],
        on_use: OnUse,
        is_use: Callable[[], bool],
    ) -> None:
        super().__init__(parameters)
        self._managed = {name: (parameters[name], chunk) for name, chunk in chunks.items()}
        self._on_use = on_use
        self._is_use = is_use

    def __getitem__(self, name: Key) -> Any:
        parameter = super().__getitem__(name)
        managed = self._managed.get(name)
        # It is another one while functional_call has put a tensor of its own there.
        if managed is not None and managed[1].pins == 0 and managed[0] is parameter:
            caller = sys._getframe(1)  # nn.Module.__getattr__, and the one who asked is above it
            if caller.f_back is None or not _only_describes(caller.f_back.f_code, caller.f_back.f_lasti):
                self._on_use(parameter, managed[1])
        return parameter

    def items(self) -> Any:
        return self._used() if self._is_use() else super().items()

    def _used(self) -> Iterator[tuple[Key, Any]]:
        return ((name, self[name]) for name in tuple(self))

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError(
            "a part of a boosted model cannot be copied: its parameters live in chunks. Build a second one and load "
            "what gemini.named_tensors(model) gives"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "a part of a boosted model cannot be pickled: its parameters live in chunks. Save the model with "
            "booster.save_model, or pickle model.state_dict()"
        )


def watch_parameters(module: nn.Module, chunks: Mapping[Key, Chunk], on_use: OnUse, is_use: Callable[[], bool]) -> None:
    """Have uses of the module's managed parameters told, from now on."""
    if chunks:
        module.__dict__["_parameters"] = WatchedParameters(module._parameters, chunks, on_use, is_use)


@lru_cache(maxsize=1024)
def _only_describes(code: CodeType, asked_at: int) -> bool:
    """True for code such as ``module.weight.dtype``, by the instruction that follows: it needs no values.

    Where this does not see it (``w = module.weight``), the parameter is brought for nothing, which is never wrong.
    """
    following = (instruction for instruction in dis.get_instructions(code) if instruction.offset > asked_at)
    instruction = next(following, None)
    return instruction is not None and "LOAD_" in instruction.opname and instruction.argval in DESCRIBING
