"""Translating PyTorch's events into calls of the runtime; nothing else happens here.

Forward: module hooks. Backward: a prehook on the autograd node of each output enters. What comes first leaves:

- hooks after the last nodes that the unit made, where these are known (see `subgraph`);
- hooks on the gradients of its inputs: nodes run in reverse order of creation, so when these gradients are complete
  every node of the unit has run, and maybe much more, if others read the same tensor. Where an input is a leaf, needs
  no gradient or was changed in place, they say nothing;
- the end of the backward.

No ``autograd.Function``, no tensor subclass.

What no hook brackets is held until the optimizer has stepped: a unit whose results cannot be seen, and in a backward
that will itself be differentiated whatever it uses, because the nodes that it makes belong to no unit. Uses outside of
any unit come from the parameters themselves: see `outside`.

Hooks on autograd nodes hold a visit, and of this object a weak reference only: the garbage collector does not see
through nodes, and a model that keeps a tensor with a graph would keep itself.
"""

import sys
import threading
from collections.abc import Callable, Collection
from functools import partial
from itertools import chain
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..chunk import Chunk
from ..planning.trace import Phase
from ..units.bracket import bracket, is_compiled
from ..units.observer import Observer, tensors_in
from ..units.results import Mark, Results
from ..units.subgraph import first_nodes, last_nodes, next_number, unreachable
from ..units.units import Countdown, Unit, Units, Visit, bracketed_modules
from .dtype_errors import explain_dtypes
from .runtime import Runtime

_INTERNALS = frozenset((*vars(nn.Module()), "_gemini"))
"""Attributes that are not the user's."""
_HELD_SHARE = 4
"""A module may hold this part (one over it) of what full copies may take, for parameters that are not its own."""


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
        Called when it is found that the last backward never ended.
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
        self._schedule = runtime.updates.schedule
        self._cast_inputs = cast_inputs
        self._force_outputs_fp32 = force_outputs_fp32
        self._on_abandoned_backward = on_abandoned_backward
        self._on_error = on_error
        self._depth = 0
        """How many calls of the model are under way, one inside the other."""
        self._running: list[Visit] = []
        """Forward calls of units under way, innermost last."""
        self._itself = ref(self)
        self._thread = 0
        """The thread that runs the units in ``_running``."""
        self._observer: Observer | None = None
        self._results: Results | None = None
        """Sees what is made: the observer, or later, for a unit that is new or leaves some of it elsewhere."""
        self._observed_kinds: set[tuple[bool, bool]] = set()
        self._foreign: dict[nn.Module, Visit] = {}
        self._outside = Unit(-1, "code outside of any unit", None, ())
        self._looked_again: set[int] = set()
        """ids of parameters for which the observer has been called again."""
        runtime.on_abort = self._forget
        for unit in units.all:
            self._install(unit)
        bracket(model, self._before_model, self._after_model)

    def _install(self, unit: Unit) -> None:
        module = unit.module
        if module is not None and module is not self._model:
            # The model's own are those of a unit, too, so that a new cycle begins before it enters.
            bracket(module, partial(self._before_unit, unit), partial(self._after_unit, unit))

    # -- the model

    def call(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the model; whatever ends it, nothing is left pinned.

        Raises
        ------
        OutOfMemory
            In place of what torch raises when there is no memory for the model's own computation.
        """
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        except BaseException as error:
            if self._depth == 1 and not _in_backward():
                self._runtime.abort()  # a KeyboardInterrupt calls no hooks
                self._runtime.explain(error)
                explain_dtypes(error, self._model, self._cast_inputs)
            raise
        finally:
            self._depth -= 1

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._depth <= 1 and not _in_backward():
            self.recover()
            grad = torch.is_grad_enabled()
            self._runtime.begin_forward(grad, tuple([tuple(t.shape) for t in tensors_in((args, kwargs))]))
            # Without gradients no mode may be there: modules with a fast path for inference would leave it. What is
            # used outside of its unit then comes operation by operation, until a forward with gradients has shown it.
            if grad and (grad, model.training) not in self._observed_kinds:
                self._observer = Observer(bracketed_modules(model), self._on_use, self._on_foreign_leave)
                self._results = self._observer.__enter__()
        if self._cast_inputs is not None:
            args, kwargs = _cast(args, self._cast_inputs), _cast(kwargs, self._cast_inputs)
        self._before_unit(self._units.of[model], model, args, kwargs)
        return args, kwargs

    def recover(self) -> None:
        """Clean up after a forward or backward that an exception ended, where nobody told."""
        self._runtime.manager.origin.refuse_elsewhere()
        if _in_backward():
            return  # an optimizer that steps within backward
        if self._runtime.is_in_backward:
            self._runtime.abort()
            self._on_abandoned_backward()
        elif self._running:
            self._runtime.abort()

    def _forget(self) -> None:
        """The runtime closes every visit: stop observing."""
        self._observer = None
        self._stop_seeing()
        self._foreign.clear()
        self._running.clear()

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._after_unit(self._units.of[model], model, args, kwargs, output)
        if self._depth <= 1 and not _in_backward():
            if self._observer is not None:
                for module in list(self._foreign):
                    self._on_foreign_leave(module, self._observer.begin, output if module is model else None)
                self._observer = None
                self._stop_seeing()
                if output is not None:
                    self._observed_kinds.add((torch.is_grad_enabled(), model.training))
        return _cast(output, torch.float32) if self._force_outputs_fp32 and output is not None else None

    # -- units

    def _before_unit(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self._depth or self._running or _in_backward()):
            self._before_part(unit)
        visit = Visit(unit)
        if unit.without_gradients and not torch.is_grad_enabled():
            visit.extra = unit.without_gradients
        if _in_backward():
            self._schedule.check_current(f"{unit.name}, run again by backward,", visit.chunks)
        self._running.append(visit)
        self._thread = threading.get_ident()
        if torch.is_grad_enabled():
            visit.input_nodes = tuple(t.grad_fn for t in tensors_in((args, kwargs)) if t.requires_grad)
            if unit.leaves_elsewhere is not False and visit.chunks and self._results is None:
                self._results = visit.results = Results().__enter__()
            visit.begin = Mark(next_number(), 0) if self._results is None else self._results.mark()
        self._runtime.enter(visit, Phase.FORWARD)
        if self._results is not None and is_compiled(module):
            self._results.pause()

    def _before_part(self, unit: Unit) -> None:
        """A part of the model is called by itself; the cycle begins anew when it comes round."""
        self.recover()
        grad = torch.is_grad_enabled()
        if self._runtime.cycle.is_over(unit.index, grad):
            self._runtime.begin_forward(grad)

    def _after_unit(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        visit = next((v for v in reversed(self._running) if v.unit is unit), None)
        if visit is None:
            return  # another hook raised before ours ran
        self._running.remove(visit)
        if output is None:
            self._on_error(sys.exc_info()[1])
        if self._runtime.cycle.with_gradients and output is not None:
            self._schedule.unit_called(visit, torch.is_grad_enabled(), _in_backward())
        self._runtime.leave(visit)
        if self._results is not None and is_compiled(module):
            self._results.resume()
        if torch.is_grad_enabled():
            if self._observer is not None:
                unit.stashes = tuple(
                    name for name, value in vars(module).items() if name not in _INTERNALS and _has_graph(value)
                )
            self._watch_backward(visit, [t for t in tensors_in((args, kwargs)) if t.requires_grad], output)
        visit.input_nodes = ()
        if visit.results is not None:
            visit.results = None
            self._stop_seeing()

    def _stop_seeing(self) -> None:
        if self._results is not None:
            results, self._results = self._results, None
            results.__exit__(None, None, None)

    def _watch_backward(self, visit: Visit, inputs: list[Tensor], output: Any) -> None:
        module = visit.unit.module
        stashed = tuple(getattr(module, name, None) for name in visit.unit.stashes)
        results = chain(tensors_in(output), tensors_in(stashed), inputs)
        own = range(0) if visit.begin is None else range(visit.begin.number, next_number())
        nodes = first_nodes(results, visit.input_nodes, own)
        if self._results is not None and visit.begin is not None and visit.chunks and not _is_raising():
            elsewhere = unreachable(self._results.since(visit.begin), nodes, own)
            visit.unit.leaves_elsewhere = bool(visit.unit.leaves_elsewhere or elsewhere)
            nodes |= elsewhere
        self._enter_before(visit, nodes)
        if not nodes:
            if output is not None and _makes_gradients(visit, inputs):
                self._runtime.hold(visit.chunks)
            return
        last = last_nodes(nodes, visit.input_nodes, own)
        self._leave_after(visit, [node.register_hook for node in last])
        if self._results is not None:
            visit.unit.is_closed = bool(last)
        elif visit.unit.is_closed and not last:
            self._runtime.hold(visit.chunks)  # some of the graph may be elsewhere now; the observer will tell
            visit.unit.is_closed = False
            self._observed_kinds.clear()
        if all(t.grad_fn is not None and t.grad_fn in visit.input_nodes for t in inputs):
            # Not register_multi_grad_hook: its closure holds the nodes that hold it, and such graphs are never freed.
            self._leave_after(visit, [t.register_hook for t in {id(t): t for t in inputs}.values()])

    def _enter_before(self, visit: Visit, nodes: "Collection[Any]") -> None:
        """Have backward enter a visit before it runs the first of these."""
        before = partial(_before_backward, self._itself, visit)
        for node in nodes:
            node.register_prehook(before)

    def _leave_after(self, visit: Visit, hookings: "list[Callable[[Callable[..., None]], object]]") -> None:
        """Have backward leave a visit when each of these has called its hook."""
        if hookings:
            countdown = Countdown(len(hookings))
            visit.countdowns.append(countdown)
            for hook_on in hookings:
                hook_on(partial(_count, self._itself, visit, countdown))

    def _before_backward(self, visit: Visit) -> None:
        task = torch._C._current_graph_task_id()
        if self._runtime.join_backward(task, visit):
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._runtime.end_backward, task))
        if not visit.is_open:
            for countdown in visit.countdowns:
                countdown.restart()
            if visit.unit is self._outside:
                self._runtime.enter_outside(visit)
            else:
                self._runtime.enter(visit, Phase.BACKWARD)
        if torch.is_grad_enabled():  # create_graph=True
            self._runtime.hold(visit.chunks)

    # -- uses outside of a parameter's own unit

    def _on_use(self, parameter: nn.Parameter, module: nn.Module) -> None:
        """The observer saw an operation that takes a parameter; from now on ``module`` brings it."""
        place = self._runtime.manager.find(parameter)
        if place is None or place[0].pins > 0:
            return
        known = self._units.of.get(module)
        if not self._is_worth_holding(known.chunks if known is not None else (), place[0]):
            return  # it comes for each operation: see `outside`
        unit, is_new = self._units.extend(module, parameter)
        if is_new:
            self._install(unit)
        visit = next((v for v in reversed(self._running) if v.unit is unit), None) or self._foreign.get(module)
        if visit is None:
            # Its hooks came too late for this call: the observer closes the visit, its inputs are not known.
            visit = self._foreign[module] = Visit(unit)
        self._runtime.add_to_open(visit, [place[0]])

    def _on_foreign_leave(self, module: nn.Module, begin: Mark, output: Any) -> None:
        visit = self._foreign.pop(module, None)
        if visit is None:
            return
        self._runtime.leave(visit)
        if torch.is_grad_enabled():
            visit.begin = begin
            self._watch_backward(visit, [], output)

    # -- uses outside of any unit

    @property
    def innermost(self) -> Visit | None:
        """The unit whose forward this thread is in, if any."""
        is_inside = self._running and self._thread == threading.get_ident() and not _in_backward()
        return self._running[-1] if is_inside else None

    def add_to_innermost(self, chunks: tuple[Chunk, ...], parameters: Collection[Tensor]) -> bool:
        """If a unit runs that uses parameters that it does not bracket, have them there until it ends; False if not."""
        visit = self.innermost
        if visit is None or not self._is_worth_holding(visit.chunks, *chunks):
            return False
        visit.extra = (*visit.extra, *chunks)
        self._runtime.add_to_open(visit, chunks)
        unknown = {id(parameter) for parameter in parameters} - self._looked_again
        if unknown and self._observer is None:
            self._looked_again |= unknown
            self._observed_kinds.clear()  # to learn which module it is
        return True

    def _is_worth_holding(self, held: tuple[Chunk, ...], *more: Chunk) -> bool:
        """False where a module that reaches for parameters of others would fill DEVICE with them.

        A model that looks at the weights of all of its layers (a penalty, a log) needs them one after the other. Where
        chunks are updated within backward, each use has to be known by its unit.
        """
        if self._schedule.consumes_gradients:
            return True
        nbytes = sum(chunk.full_nbytes for chunk in {*held, *more})
        return nbytes * _HELD_SHARE <= self._runtime.full_capacity_bytes

    def bring_in_backward(self, begin: int, result: Any, chunks: tuple[Chunk, ...]) -> None:
        """Have these chunks there when backward comes to what an operation outside of any unit made.

        Parameters
        ----------
        begin
            The number of the first autograd node that it may have made.
        result
            What it returned.
        """
        own = range(begin, next_number())
        nodes = {node for node in first_nodes(tensors_in(result), (), own) if node._sequence_nr() in own}
        if nodes:
            visit = Visit(self._outside, extra=chunks)
            self._enter_before(visit, nodes)
            self._leave_after(visit, [node.register_hook for node in last_nodes(nodes, _NotIn(own), own)])


class _NotIn:
    """Every autograd node whose number is not in a range."""

    def __init__(self, own: range) -> None:
        self._own = own

    def __contains__(self, node: Any) -> bool:
        return node._sequence_nr() not in self._own


def _before_backward(hooks: "ref[Hooks]", visit: Visit, gradients: Any) -> None:
    target = hooks()
    if target is not None:
        target._before_backward(visit)


def _count(hooks: "ref[Hooks]", visit: Visit, countdown: Countdown, *gradients: Any) -> None:
    target = hooks()
    # What this backward does not come to is never counted: the visit then ends with the backward.
    if target is not None and countdown.tick():
        target._runtime.leave_backward(visit)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_raising() -> bool:
    """True while an exception is handled: its traceback keeps what calls have made."""
    return sys.exc_info()[0] is not None


def _has_graph(value: Any) -> bool:
    return any(t.grad_fn is not None for t in tensors_in(value))


def _makes_gradients(visit: Visit, inputs: list[Tensor]) -> bool:
    """False for what has no part in any backward, such as a frozen module on data."""
    module = visit.unit.module
    own = () if module is None else module.parameters(recurse=False)
    return bool(inputs) or any(parameter.requires_grad for parameter in own)


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
