"""Finds uses of parameters outside of their own module, during the first cycle of each kind.

A ``TorchFunctionMode`` sees every operation that takes a parameter. One whose chunk is not pinned is fetched on the
spot, and the module that was running is made to bracket it from then on. Later cycles run without the mode: a unit
hook costs microseconds a unit, the mode costs as much an operation.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..torch_private import is_compiled
from .promotions import Promotions
from .results import Mark, Results

READING_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Tensor properties that hand out values; all others (shape, dtype, grad, ...) only describe."""
DESCRIBING = frozenset(
    "shape dtype device layout ndim grad requires_grad is_leaf is_cuda size dim "
    "ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex "
    "is_signed get_device has_names type register_hook register_post_accumulate_grad_hook requires_grad_ is_pinned "
    "is_same_size is_set_to is_inference __hash__ __repr__ is_tensor".split()
)


class Observer(Results):
    """Calls ``on_use(parameter, running module)`` for each use of a parameter's values.

    Parameters
    ----------
    modules
        Only their calls count as running; the first is the model.
    on_use
        Asked before the operation runs; brings the parameter if need be.
    on_leave
        Told when a module's forward ends, with when it began and its output (None after an exception).
    promotions
        What follows float32 tensors in a model that computes in half precision; None if it does not.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        on_use: Callable[[nn.Parameter, nn.Module], None],
        on_leave: Callable[[nn.Module, Mark, Any], None],
        promotions: Promotions | None = None,
    ) -> None:
        super().__init__()
        self._modules = tuple(modules)
        self._on_use = on_use
        self._on_leave = on_leave
        self._promotions = promotions
        self.begin = self.mark()
        """When the model began."""
        self._running: list[tuple[nn.Module, Mark]] = [(self._modules[0], self.begin)]
        self._hooks = ExitStack()

    def __enter__(self) -> "Observer":
        # On every module, because any may turn out to bracket a use; gone again at exit.
        for module in self._modules[1:]:
            if is_compiled(module):
                continue  # its hooks would be compiled with it; nothing is seen within it anyway
            self._hooks.callback(module.register_forward_pre_hook(self._enter_module).remove)
            self._hooks.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._hooks.close()

    @property
    def running(self) -> Iterator[nn.Module]:
        """The modules whose forward is under way, outermost first."""
        return (module for module, _ in self._running)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._running.append((module, self.mark()))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if len(self._running) > 1 and self._running[-1][0] is module:
            self._on_leave(*self._running.pop(), output)
            self.returns(module, output)

    def returns(self, module: nn.Module, output: Any) -> None:
        """A module returns; hooks of ours tell it, for the model those of its forward."""
        if self._promotions is not None:
            self._promotions.leaves(module, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reads_values(func):
            for parameter in _parameters((args, kwargs)):
                self._on_use(parameter, self._running[-1][0])
        result = super().__torch_function__(func, types, args, kwargs)
        if self._promotions is not None:
            self._promotions.saw(self._running[-1][0], args, kwargs, result)
        return result


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
