"""Seeing uses of parameters outside of their own module, during the first cycle of each kind.

A ``TorchFunctionMode`` sees every operation that takes a parameter. One whose chunk is not pinned is fetched on the
spot, and the module that was running is made to bracket it from then on. Later cycles run without the mode: a unit
hook costs microseconds a unit, the mode costs as much an operation.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

READING_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Tensor properties that hand out values; all others (shape, dtype, grad, ...) only describe."""
DESCRIBING = frozenset(
    "size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex "
    "is_signed get_device has_names type register_hook register_post_accumulate_grad_hook requires_grad_ is_pinned "
    "is_same_size is_inference __hash__ __repr__ is_tensor".split()
)


class Observer(TorchFunctionMode):
    """Calls ``on_use(parameter, running module)`` for each use of a parameter's values.

    Parameters
    ----------
    model
        Only calls of its modules count as running.
    on_use
        Asked before the operation runs; brings the parameter if need be.
    on_leave
        Told when a module's forward ends, with its output (None after an exception).
    """

    def __init__(
        self,
        model: nn.Module,
        on_use: Callable[[nn.Parameter, nn.Module], None],
        on_leave: Callable[[nn.Module, Any], None],
    ) -> None:
        super().__init__()
        self._modules = set(model.modules())
        self._on_use = on_use
        self._on_leave = on_leave
        self._running: list[nn.Module] = [model]
        self._hooks = ExitStack()

    def __enter__(self) -> "Observer":
        # Global hooks, because any module may turn out to bracket a use; gone again at exit.
        self._hooks.callback(register_module_forward_pre_hook(self._enter_module).remove)
        self._hooks.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._hooks.close()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if module in self._modules:
            self._running.append(module)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._modules and len(self._running) > 1 and self._running[-1] is module:
            self._running.pop()
            self._on_leave(module, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reads_values(func):
            for parameter in _parameters((args, kwargs)):
                self._on_use(parameter, self._running[-1])
        return func(*args, **kwargs)


def reads_values(func: Any) -> bool:
    """False for what only describes a tensor, such as ``shape`` or ``size()``."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in READING_PROPERTIES
    return name not in DESCRIBING and name not in ("__set__", "__delete__")


def _parameters(value: Any) -> Iterator[nn.Parameter]:
    if isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parameters(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _parameters(item)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclass-like outputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))
