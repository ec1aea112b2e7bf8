"""From calls of modules to the engine: a unit enters before its forward and leaves after it.

Uses of a parameter outside of its own unit are found by an observer in the first forward of each kind: the module that
was running becomes a unit, and brings the parameter from then on. Uses outside of any unit come from the parameters
themselves: see `outside`.
"""

import logging
import sys
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..activations import Saving
from ..chunk import reach
from ..engine import Engine, in_backward
from ..errors import OutOfMemory, is_out_of_memory
from ..memory.shortage import out_of_memory, told
from ..planning.trace import Phase
from ..signals import uninterrupted
from ..torch_private import NO_BACKWARD, current_backward, is_compiled, next_number
from ..units.bracket import Bracket, bracket
from ..units.nested import needing_gradients, tensors_in
from ..units.observer import Observer
from ..units.promotions import HALF, Promotions
from ..units.results import Mark
from ..units.units import Unit, Visit, bracketed_modules
from .backward import BackwardHooks
from .before import Before, BufferHabits, forget_frames
from .brackets import Brackets
from .casting import cast
from .dtype_errors import explain_dtypes
from .tenancy import Tenancy

logger = logging.getLogger(__name__)

_MOST_REPETITIONS = 8
"""Each gives at least twice as much as the one before."""

_node_of = attrgetter("grad_fn")

_INTERNALS = frozenset((*vars(nn.Module()), "_gemini"))
"""Attributes that are not the user's."""


class ForwardHooks:
    """The hooks on one model and its units.

    Parameters
    ----------
    model, engine, backward, saving, tenancy
        The model that is run, what is told, what puts hooks on the graphs that units make, what becomes of the tensors
        that these save, and what the model shares.
    cast_inputs
        Floating-point inputs of the model are converted to this dtype; None leaves them.
    force_outputs_fp32
        Floating-point outputs of the model are converted to fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        backward: BackwardHooks,
        saving: Saving,
        tenancy: Tenancy,
        *,
        cast_inputs: torch.dtype | None,
        force_outputs_fp32: bool,
    ) -> None:
        self._model = model
        self._units = engine.units
        self._engine = engine
        self._backward = backward
        self._saving = saving
        self._tenancy = tenancy
        self._cast_inputs = cast_inputs
        self._force_outputs_fp32 = force_outputs_fp32
        self._visits = engine.visits
        self._discovery = engine.discovery
        self._habits = BufferHabits()
        self._depth = 0
        """How many calls of the model are under way, one inside the other."""
        self._brackets = Brackets(engine.units, self._install)
        self._bracket = bracket(model, self._before_model, self._after_model)

    def _install(self, unit: Unit) -> Bracket:
        module = unit.module
        if module is None or module is self._model:
            # The model's own are those of a unit, too, so that a new cycle begins before it enters.
            return Bracket()
        return bracket(module, partial(self._before_unit, unit), partial(self._after_unit, unit))

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._bracket.remove()
        self._brackets.remove()

    # -- the model

    def call(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the model; whatever ends it, nothing is left pinned.

        A forward that ran out of memory runs again, for as long as there is something to give it room with. So does one
        that is being measured and leaves too little for its backward, if it can keep less.

        Raises
        ------
        OutOfMemory
            In place of what torch raises when there is no memory for the model's own computation.
        """
        if self._depth or in_backward():
            return self._run(forward, args, kwargs)
        had_grad = torch.is_grad_enabled()
        try:
            with uninterrupted.watched():
                return self._call(forward, args, kwargs)
        except BaseException:
            torch.set_grad_enabled(had_grad)  # leaving `torch.no_grad` takes memory, which may have run out
            raise

    def _call(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        attempt, before = 0, self._before(args, kwargs)
        while True:
            try:
                result = self._run(forward, args, kwargs)
            except BaseException as error:
                self._failed(error, before, attempt)
            else:
                with uninterrupted:
                    if attempt == _MOST_REPETITIONS or not self._is_to_keep_less(result, before):
                        before.learn()
                        return result
                result = None
            with uninterrupted:
                before.restore()
            attempt += 1

    def _is_to_keep_less(self, result: Any, before: Before) -> bool:
        """True if a forward that is over is to run again, since its backward would find no memory."""
        if not self._engine.sampling.profile.is_measuring or before.obstacle():
            return False
        results = [tensor for tensor in tensors_in(result) if tensor.requires_grad]
        if not self._engine.memory.makes_room_for_backward(max((tensor.numel() for tensor in results), default=0)):
            return False
        logger.info("a forward leaves too little memory for its backward and runs again")
        return True

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        depth = self._depth
        try:
            try:
                self._depth = depth + 1
                with self._saving.of_call():
                    return forward(*args, **kwargs)
            finally:
                self._depth = depth
        finally:
            self._depth = depth  # an interrupt may have come before the same line above

    @uninterrupted
    def _before(self, args: Any, kwargs: Any) -> Before:
        """What the forward has to find if it is repeated."""
        updates, parameters = self._engine.updates, self._engine.memory.packing.parameters
        with told(self._engine.manager.ledger, "what comes before a forward"):
            return Before(self._model, parameters, args, kwargs, self._habits, lambda: updates.arrivals)

    @uninterrupted
    def _failed(self, error: BaseException, before: Before, attempt: int) -> None:
        """The model's forward has raised. Raises, if it cannot run again."""
        engine = self._engine
        done = engine.pacing.done
        engine.abort()  # a KeyboardInterrupt calls no hooks
        if is_out_of_memory(error):
            obstacle = before.obstacle()
            forget_frames(error)  # they have the activations
            given = engine.memory.make_room(error, attempt, done)
            # What full copies give up is of no use to a move that has failed: it takes it back.
            helps = (
                given.moved_bytes > 0 or given.keeps_less or (given.is_something and not isinstance(error, OutOfMemory))
            )
            if not obstacle and helps and attempt < _MOST_REPETITIONS:
                logger.info("a forward ran out of memory (%s) and runs again in more", error)
                error.with_traceback(None)  # code that keeps the error would keep the model
                return
            if not isinstance(error, OutOfMemory):
                raise out_of_memory(error, engine.manager, given, obstacle=obstacle) from error
        explain_dtypes(error, self._model, self._cast_inputs)
        raise error

    def _before_model(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._depth <= 1 and not in_backward():
            self._engine.recover()
            self._saving.rest()
            self._tenancy.before_forward()
            grad = torch.is_grad_enabled()
            self._engine.begin_forward(grad, tuple([tuple(t.shape) for t in tensors_in((args, kwargs))]))
            if (batch := self._engine.sampling.batch) is not None:
                self._saving.begin(batch)
            # Without gradients no mode may be there: modules with a fast path for inference would leave it. What is
            # used outside of its unit then comes operation by operation, until a forward with gradients has shown it.
            if grad and not self._discovery.has_watched((grad, model.training)):
                self._brackets.refine()
                promotions = Promotions() if self._cast_inputs in HALF else None
                observer = Observer(bracketed_modules(model), self._on_use, self._on_foreign_leave, promotions)
                self._discovery.begin(observer)
            elif self._engine.needs_each_unit:
                self._brackets.refine()
            else:
                self._brackets.coarsen(self._engine.manager.chunks, self._engine.room.full_capacity_bytes)
        if self._cast_inputs is not None:
            args, kwargs = cast(args, self._cast_inputs), cast(kwargs, self._cast_inputs)
        self._before_unit(self._brackets.unit_of(model), model, args, kwargs)
        return args, kwargs

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._after_unit(self._brackets.unit_of(model), model, args, kwargs, output)
        observer = self._discovery.observer
        if observer is not None and self._depth <= 1 and not in_backward():
            for module in list(self._discovery.foreign):
                self._on_foreign_leave(module, observer.begin, output if module is model else None)
            observer.returns(model, output)
            self._discovery.end(None if output is None else (torch.is_grad_enabled(), model.training))
        return cast(output, torch.float32) if self._force_outputs_fp32 and output is not None else None

    # -- units

    def _before_unit(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> None:
        engine, discovery, task = self._engine, self._discovery, current_backward()
        is_in_backward = task != NO_BACKWARD
        if not (self._depth or is_in_backward or self._visits.running):
            self._before_part(unit)
        has_gradients = torch.is_grad_enabled()
        visit = Visit(unit) if has_gradients else Visit(unit, extra=unit.without_gradients)
        if is_in_backward:
            engine.leave_passed(task)
            engine.updates.schedule.check_current(f"{unit.name}, run again by backward,", visit.chunks)
        elif self._depth and self._tenancy.budget.is_due:
            self._tenancy.look_before_unit()
        if discovery.observer is not None or not (self._depth or is_in_backward):
            self._note_running(unit, module)
        self._visits.begin_call(visit)
        if has_gradients:
            nodes = list(map(_node_of, needing_gradients(args, kwargs)))
            is_watched_alone = unit.leaks_graph is not False and discovery.results is None and bool(visit.chunks)
            watching = discovery.watch() if is_watched_alone else discovery.results
            mark = Mark(next_number(), 0) if watching is None else watching.mark()
            visit.begins(mark, nodes, watching if is_watched_alone else None)
        engine.enter(visit, Phase.FORWARD)
        if discovery.results is not None and is_compiled(module):
            discovery.results.pause()

    def _note_running(self, unit: Unit, module: nn.Module) -> None:
        if self._brackets.are_coarse:
            return
        if self._discovery.observer is not None:
            self._brackets.saw(unit, (*self._discovery.observer.running, module))
        else:
            units = (visit.unit.module for visit in self._visits.running)
            self._brackets.saw(unit, (module, *(around for around in units if around is not None)))

    def _before_part(self, unit: Unit) -> None:
        """A part of the model is called by itself; the cycle begins anew when it comes round."""
        self._engine.recover()
        grad = torch.is_grad_enabled()
        if self._engine.pacing.cycle.is_over(unit.index, grad):
            self._engine.begin_forward(grad)

    def _after_unit(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        visit = self._visits.end_call(unit)
        if visit is None:
            return  # another hook raised before ours ran
        if output is None:
            self._engine.listener.failed(self._engine, sys.exc_info()[1])  # while its visit is still open
        engine, discovery, has_gradients = self._engine, self._discovery, torch.is_grad_enabled()
        if engine.updates.schedule.watches_units and engine.pacing.cycle.with_gradients and output is not None:
            engine.updates.schedule.unit_called(visit, has_gradients, in_backward())
        engine.leave(visit)
        if discovery.results is not None and is_compiled(module):
            discovery.results.resume()
        if has_gradients:
            if discovery.observer is not None:
                unit.leaves_graphs_in(
                    name for name, value in vars(module).items() if name not in _INTERNALS and _has_graph(value)
                )
            if self._backward.watch(visit, needing_gradients(args, kwargs), output, discovery.results):
                discovery.watch_again()
        if visit.results is not None:
            discovery.stop_watching()
        visit.ends()

    # -- uses outside of a parameter's own unit

    def _on_use(self, parameter: nn.Parameter, module: nn.Module) -> None:
        """The observer saw an operation that takes a parameter; from now on ``module`` brings it."""
        place = self._engine.manager.find(parameter)
        if place is None or place[0].pins > 0:
            return
        known = self._engine.units.of.get(module)
        if not self._engine.is_worth_holding(known.chunks if known is not None else (), place[0]):
            return  # it comes for each operation: see `outside`
        unit, is_new = self._units.extend(module, parameter)
        if is_new:
            self._brackets.add(unit)
        visit = self._visits.call_of(unit) or self._discovery.foreign.get(module)
        if visit is None:
            # Its hooks came too late for this call: the observer closes the visit, its inputs are not known.
            visit = self._discovery.foreign[module] = Visit(unit)
        self._engine.add_to_open(visit, [place[0]])
        reach(parameter)  # the operation may be the one that hands out its ``data``

    def _on_foreign_leave(self, module: nn.Module, begin: Mark, output: Any) -> None:
        visit = self._discovery.foreign.pop(module, None)
        if visit is None:
            return
        self._engine.leave(visit)
        if torch.is_grad_enabled():
            visit.begins(begin)
            if self._backward.watch(visit, [], output, self._discovery.results):
                self._discovery.watch_again()


def _has_graph(value: Any) -> bool:
    return any(t.grad_fn is not None for t in tensors_in(value))
