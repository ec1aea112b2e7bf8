"""Translating PyTorch's events into calls of the runtime; nothing else happens here.

Forward: module hooks. Backward: a prehook on the autograd node of each output enters, a hook on the gradients of the
inputs leaves (nodes run in reverse order of creation, so when the inputs' gradients are there every node of the unit
has run). Where an input is a leaf, needs no gradient or was changed in place, that does not hold, and the unit leaves
when the backward is over. No ``autograd.Function``, no tensor subclass.
"""

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .chunk import Chunk, ChunkManager
from .observer import Observer, tensors_in
from .runtime import Runtime
from .trace import Phase
from .units import Unit, Units, Visit


class Hooks:
    """Everything that is installed on one model.

    Parameters
    ----------
    model, units, runtime
        What is run, by what it is bracketed, and who is told.
    cast_inputs
        Floating-point inputs of the model are converted to this dtype; None leaves them.
    force_outputs_fp32
        Floating-point outputs of the model are converted to fp32.
    on_abandoned_backward
        Called when a new forward finds that the last backward never ended.
    on_error
        Called with the exception that ends a unit's forward (or None), while its visit is still open.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Units,
        runtime: Runtime,
        *,
        cast_inputs: torch.dtype | None,
        force_outputs_fp32: bool,
        on_abandoned_backward: Callable[[], None],
        on_error: Callable[[BaseException | None], None] = lambda error: None,
    ) -> None:
        self._model = model
        self._units = units
        self._runtime = runtime
        self._cast_inputs = cast_inputs
        self._force_outputs_fp32 = force_outputs_fp32
        self._on_abandoned_backward = on_abandoned_backward
        self._on_error = on_error
        self._observer: Observer | None = None
        self._observed_kinds: set[tuple[bool, bool]] = set()
        self._foreign: dict[nn.Module, Visit] = {}
        for unit in units.all:
            self._install(unit)
        model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True)
        model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)

    def _install(self, unit: Unit) -> None:
        if unit.module is self._model:
            return  # its hooks are the model's, so that a new cycle begins before it enters
        unit.module.register_forward_pre_hook(partial(self._before_unit, unit), with_kwargs=True, prepend=True)
        unit.module.register_forward_hook(partial(self._after_unit, unit), with_kwargs=True, always_call=True)

    # -- the model

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() == -1:
            self._recover()
            grad = torch.is_grad_enabled()
            self._runtime.begin_forward(grad)
            if (grad, model.training) not in self._observed_kinds:
                self._observer = Observer(model, self._on_use, self._on_foreign_leave).__enter__()
        if self._cast_inputs is not None:
            args, kwargs = _cast(args, self._cast_inputs), _cast(kwargs, self._cast_inputs)
        root = self._units.of.get(model)
        if root is not None:
            self._before_unit(root, model, args, kwargs)
        return args, kwargs

    def _recover(self) -> None:
        """Clean up after a forward or backward that an exception ended."""
        if self._runtime.is_in_backward:
            self.abandon()
            self._on_abandoned_backward()
        elif self._runtime.has_open_visits:  # a KeyboardInterrupt: PyTorch calls no hooks then
            self.abandon()

    def abandon(self) -> None:
        """Close every visit and stop observing."""
        if self._observer is not None:
            observer, self._observer = self._observer, None
            observer.__exit__(None, None, None)
        self._foreign.clear()
        for unit in self._units.all:
            unit.visits.clear()
        self._runtime.abort()

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        root = self._units.of.get(model)
        if root is not None:
            self._after_unit(root, model, args, kwargs, output)
        elif output is None:
            self._on_error(sys.exc_info()[1])
        if self._observer is not None and torch._C._current_graph_task_id() == -1:
            observer, self._observer = self._observer, None
            observer.__exit__(None, None, None)
            for module in list(self._foreign):
                self._on_foreign_leave(module, output if module is model else None)
            if output is not None:
                self._observed_kinds.add((torch.is_grad_enabled(), model.training))
        return _cast(output, torch.float32) if self._force_outputs_fp32 and output is not None else None

    # -- units

    def _before_unit(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        visit = Visit(unit)
        unit.visits.append(visit)
        if torch.is_grad_enabled():
            visit.input_nodes = tuple(t.grad_fn for t in tensors_in((args, kwargs)) if t.requires_grad)
        self._runtime.enter(visit, Phase.FORWARD)

    def _after_unit(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not unit.visits:
            return  # another hook raised before ours ran
        visit = unit.visits.pop()
        if output is None:
            self._on_error(sys.exc_info()[1])
        self._runtime.leave(visit)
        if output is not None and torch.is_grad_enabled():
            self._watch_backward(visit, [t for t in tensors_in((args, kwargs)) if t.requires_grad], output)
        visit.input_nodes = ()

    def _watch_backward(self, visit: Visit, inputs: list[Tensor], output: Any) -> None:
        nodes = {t.grad_fn for t in tensors_in(output) if t.grad_fn is not None and t.grad_fn not in visit.input_nodes}
        for node in nodes:
            node.register_prehook(partial(self._before_backward, visit))
        unchanged = all(t.grad_fn is not None and t.grad_fn in visit.input_nodes for t in inputs)
        if nodes and inputs and unchanged:
            # Not register_multi_grad_hook: its closure holds the nodes that hold it, and such graphs are never freed.
            visit.input_count = len({id(t) for t in inputs})
            for tensor in {id(t): t for t in inputs}.values():
                tensor.register_hook(partial(self._after_input, visit))

    def _before_backward(self, visit: Visit, gradients: Any) -> None:
        task = torch._C._current_graph_task_id()
        if self._runtime.join_backward(task, visit):
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._runtime.end_backward, task))
        if not visit.is_open:
            visit.inputs_missing = visit.input_count
            self._runtime.enter(visit, Phase.BACKWARD)

    def _after_input(self, visit: Visit, gradient: Any) -> None:
        # An input without a gradient in this backward never comes: the visit then ends with the backward.
        visit.inputs_missing -= 1
        if visit.inputs_missing == 0:
            self._runtime.leave(visit)

    # -- uses outside of a parameter's own unit, seen by the observer

    def _on_use(self, parameter: nn.Parameter, module: nn.Module) -> None:
        place = self._runtime.manager.find(parameter)
        if place is None or place[0].pins > 0:
            return
        unit, is_new = self._units.extend(module, parameter)
        if is_new:
            self._install(unit)
        if unit.visits:
            visit = unit.visits[-1]
        elif module in self._foreign:
            visit = self._foreign[module]
        else:
            # Its hooks came too late for this call: the observer closes the visit, its inputs are not known.
            visit = self._foreign[module] = Visit(unit)
        self._runtime.add_to_open(visit, [place[0]])

    def _on_foreign_leave(self, module: nn.Module, output: Any) -> None:
        visit = self._foreign.pop(module, None)
        if visit is None:
            return
        self._runtime.leave(visit)
        if output is not None and torch.is_grad_enabled():
            self._watch_backward(visit, [], output)


def watch_gradients(manager: ChunkManager, parameters: list[nn.Parameter]) -> None:
    """Move each gradient into its chunk's buffer as soon as it is complete, and free ``p.grad``."""
    for parameter in parameters:
        place = manager.find(parameter)
        if place is not None and place[0].gradient is not None:
            chunk, position = place
            # Weak: the garbage collector does not see through hooks that live in C++, and the chunk has the parameter.
            parameter.register_post_accumulate_grad_hook(partial(_take_gradient, weakref.ref(chunk), position))


def _take_gradient(reference: "weakref.ref[Chunk]", position: int, parameter: Tensor) -> None:
    gradient, chunk = parameter.grad, reference()
    if gradient is None or chunk is None:
        return
    assert chunk.gradient is not None
    chunk.settle()  # the last step may still be reading the buffer (when gradients were not zeroed)
    chunk.gradient.add(position, gradient)
    parameter.grad = None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        cast = {key: _cast(item, dtype) for key, item in value.items()}
        if type(value) is dict:
            return cast
        for key, item in cast.items():  # ModelOutput and its like: keep the class
            value[key] = item
        return value
    if isinstance(value, tuple):
        items = [_cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value
