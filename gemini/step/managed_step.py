"""What a boosted optimizer does: unscale, clip, and hand each chunk's update to the queue."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..chunk import QUIET, Chunk, all_or_none
from ..engine import Engine, StepFacts
from ..memory.shortage import told
from ..nn.optimizer.managed import ManagedOptimizer
from ..packing.packing import Packing
from ..signals import uninterrupted
from ..updates.averages import Average, Averages
from ..updates.commitment import surely
from ..updates.gradient_norm import find_gradients
from ..updates.options import Options
from ..updates.updater import Groups, Planned, Updater
from ..updates.updates import Updates
from .average_room import AverageRoom
from .kept_states import KeptStates
from .one_of_several import refuse_alone
from .state_id import OPTIMIZER, StateId
from .state_mapping import OptimizerStates
from .states import States
from .succession import check_room
from .unfreezing import Unfreezing

logger = logging.getLogger(__name__)


@uninterrupted.in_methods(
    *("step", "zero_grad", "zero_gradients", "clip_grad_by_norm", "clip_grad_by_value", "state_dict"),
    *("load_state_dict", "replace_states", "add_param_group", "succeed", "add_average", "remove_average", "swap"),
)
class ChunkedStep:
    """The optimizer step over chunks (a `ManagedStep`).

    Parameters
    ----------
    engine, updater, updates
        Knows the order of use, plans updates, and leads gradients to them.
    unfreezing
        Makes room for parameters that are added later.
    kept
        Has the states of parameters in chunks.
    state_id
        Names what is saved.
    """

    def __init__(
        self,
        engine: Engine,
        updater: Updater,
        updates: Updates,
        unfreezing: Unfreezing,
        kept: KeptStates,
        state_id: StateId,
    ) -> None:
        self.manager = engine.manager
        self._states = States(kept)
        self._engine = engine
        self._updater = updater
        self._updates = updates
        self.scaling = updates.scaling
        self._unfreezing = unfreezing
        self.state_id = state_id
        self._changes = 0
        """The number of steps and swaps that have begun."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while a step is taken."""
        return self._engine.lock

    def mark(self) -> object:
        """Something that is equal as long as no step, swap or load changes values. Waits for a step under way."""
        with self.lock:
            return self.state_id.text, self._changes, len(self._updates.schedule.updated_early)

    @property
    def kept(self) -> KeptStates:
        """The states of parameters in chunks."""
        return self._states.kept

    @property
    def averages(self) -> Averages:
        """What follows the parameters in each step."""
        return self._updater.averages

    def add_average(self, average: Average) -> None:
        """Have an average follow the parameters, beginning with what they are.

        Raises
        ------
        OutOfMemory, OffloadError
            If there is no room for it. Nothing has been changed then.
        RuntimeError
            While the parameters have the values of another one.
        """
        self.averages.refuse_swapped("begin an average")
        self._updates.schedule.check_whole("begin an average")
        room = AverageRoom(self.manager, self._updater)
        self._unfreezing.adopt(room.make(average, self._engine.pacing.least_bytes({})))

    def remove_average(self, average: Average) -> None:
        """Give the memory of an average back."""
        self._updates.schedule.check_whole("end an average")
        self._unfreezing.adopt(AverageRoom(self.manager, self._updater).free(average))

    def swap(self, average: Average) -> None:
        """Give the parameters the values of an average, and it theirs."""
        self._engine.recover()
        with self._engine.lock:
            self._changes += 1
            self._updates.schedule.check_whole("swap an average")
            self._engine.pins.release_held()
            AverageRoom(self.manager, self._updater).swap(average)

    @property
    def packing(self) -> Packing:
        """The plans of the chunks, as they are now."""
        return self._unfreezing.packing

    def facts(self, step: StepFacts) -> StepFacts:
        """What is known of a step, with the numbers of now."""
        scaling = self.scaling
        loss_scale = None if scaling.scaler is None else scaling.scaler.scale
        return step._replace(skipped_count=scaling.skipped_steps, loss_scale=loss_scale, grad_norm=scaling.grad_norm)

    # -- backward

    def backward(self, loss: Tensor) -> None:
        """Run backward on the (scaled) loss; after an exception nothing stays pinned and its gradients are dropped."""
        with uninterrupted.watched():
            loss = self._before_backward(loss)
            try:
                loss.backward()
            except BaseException as error:
                with uninterrupted:
                    self._engine.backward_failed(error)
                raise

    @uninterrupted
    def _before_backward(self, loss: Tensor) -> Tensor:
        self.manager.snapshots.raise_fault()
        self.averages.refuse_swapped("run backward")
        self._updates.before_backward()
        scaled = self.scaling.scaled(loss)
        self._engine.sampling.begin_backward()  # the loss may take most, and no unit has it
        return scaled

    def gradient_norm(self) -> float | None:
        return self.scaling.grad_norm

    def was_skipped(self) -> bool:
        return self.scaling.was_skipped

    def zero_gradients(self, set_to_none: bool, parameters: Set[int] | None = None) -> None:
        """Forget what is in the chunks (of these parameters, by id), or fill it with zeros."""
        if set_to_none:
            self._updates.drop(parameters)
        else:
            self._updates.schedule.check_zeroing()
            self._updates.zero(parameters)

    # -- ManagedStep

    def step(self, optimizer: ManagedOptimizer) -> None:
        self.manager.snapshots.raise_fault()
        self.averages.refuse_swapped("step")
        if optimizer.whole is not optimizer:
            refuse_alone(self.manager, self._updates)
        self._engine.recover()
        self.manager.refuse_released("step")
        with self._engine.lock:
            self._changes += 1
            # All that can fail comes first, then what cannot: a step is all or nothing, and can be repeated after an
            # error.
            with told(self.manager.ledger, "optimizer.step()"):
                work = self._begun(optimizer)
            surely(_do_all, work.left)
            surely(self._updates.wait_for_holders, work.updates)
            surely(self._updates.serve, optimizer.whole)

    def _begun(self, optimizer: ManagedOptimizer) -> "_Begun":
        """Begin the updates of chunks."""
        self._engine.pins.release_held()
        self._updates.before_step(optimizer)
        self._unfreezing.admit_all(optimizer, self.kept)
        doing = f"optimizer.step() number {self._engine.step.number + 1}"
        chunks = self._updates.collect(doing)
        options = Options.of(optimizer)
        with all_or_none(self.manager.together.communicator, f"the updates of {doing}", lambda: repr(options.copied())):
            work = self._plan(optimizer, self._updater.groups(options), chunks)
        ended = partial(self._engine.step_ended, self.facts)
        if work is None:
            return _Begun([], deque([ended]))
        updates, prepared = work
        left = deque[Callable[[], None]](partial(optimizer.commit_parameters, [each]) for each in prepared)
        left += (partial(optimizer.rules.of_group(group).after_step, [group]) for group in optimizer.param_groups)
        left += (self.averages.stepped, self.scaling.stepped, self._updates.after_step, self._prefetch, ended)
        begun = _Begun(updates, left)
        self._updates.start(updates)
        return begun

    def _plan(
        self, optimizer: ManagedOptimizer, groups: Groups, chunks: Sequence[Chunk]
    ) -> tuple[list[Planned], list[Any]] | None:
        """The updates of chunks, in the order of their next use, and of other parameters; None if they are skipped."""
        plain = self._plain_parameters(optimizer)
        grad_scale = self.scaling.of_step(chunks, groups.of, [p for parameters in plain.values() for p in parameters])
        if grad_scale is None:
            return None
        planned = [self._updater.plan(groups, chunk, grad_scale) for chunk in chunks]
        planned += map(self._updater.plan_averages, self._averaged_without(chunks))
        updates = [each for each in planned if not each.is_empty]
        order = self._engine.pacing.use_order()
        updates.sort(key=lambda update: order[update.chunk.index])
        prepared = [
            step
            for index, parameters in plain.items()
            for step in optimizer.prepare_parameters(optimizer.param_groups[index], parameters, grad_scale)
        ]
        return updates, prepared

    def _averaged_without(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks that take no part in the step, and have averages that go on."""
        others = [c for c in self.manager.chunks if c.plan.averages and c not in self._updates.schedule.updated_early]
        found = [chunk for chunk in others if chunk not in chunks]
        for chunk in found:
            self.manager.quiet(chunk)
        return found

    def _prefetch(self) -> None:
        try:
            self._engine.pacing.prefetch_next_cycle()
        except (OSError, RuntimeError, MemoryError) as error:  # the next forward fetches what it needs, or raises
            logger.debug("nothing is fetched ahead of the next forward: %s", error)

    def zero_grad(self, optimizer: ManagedOptimizer, set_to_none: bool) -> None:
        self.zero_gradients(set_to_none, _parameters(optimizer))
        for group in optimizer.param_groups:
            if set_to_none:
                with QUIET():  # what is in chunks has been forgotten
                    for parameter in group["params"]:
                        parameter.grad = None
                continue
            for parameter in group["params"]:
                if self.manager.find(parameter) is None and parameter.grad is not None:
                    parameter.grad.detach_().zero_()

    def add_param_group(self, optimizer: ManagedOptimizer, group: dict[str, Any]) -> None:
        self._updates.schedule.check_whole("add parameters")
        optimizer.register_param_group(group)
        try:
            self._unfreezing.admit(optimizer, len(optimizer.param_groups) - 1, group["params"], self.kept)
        except BaseException:
            optimizer.param_groups.pop()
            raise

    def succeed(self, optimizer: ManagedOptimizer) -> None:
        """Work for another optimizer from now on. States begin anew, or with those that it brings.

        Raises
        ------
        OutOfMemory, TypeError, ValueError
            If there is no room for what it keeps, or it brings what cannot be kept. The optimizer before it goes on
            then.
        """
        self._updates.schedule.check_whole("add parameters")
        check_room(self.manager, optimizer)
        for index, group in enumerate(optimizer.param_groups):
            # Those that are frozen still get room when they are unfrozen, as they do with the first optimizer.
            unfrozen = [p for p in group["params"] if p.requires_grad and not self.kept.keeps(p)]
            self._unfreezing.make_room(optimizer, index, unfrozen)
        self._states.succeed(optimizer)
        self._updates.serve(optimizer)

    def clip_grad_by_norm(
        self,
        optimizer: ManagedOptimizer,
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        parameters: Iterable[Tensor],
    ) -> Tensor:
        self._updates.schedule.check_clipping()
        self._unfreezing.admit_all(optimizer, self.kept)
        doing = f"clip_grad_by_norm({max_norm}, norm_type={norm_type})"
        self._updates.collect(doing)
        norms: list[Tensor] = []
        # No rank runs a backward, or forgets its gradients, until all have the norm of these.
        with all_or_none(self.manager.together.communicator, f"the norm of {doing}", lambda: str(float(norms[0]))):
            norms.append(self.scaling.norm(parameters, norm_type, error_if_nonfinite))
        self.scaling.clip(norms[0], max_norm)
        return norms[0]

    def clip_grad_by_value(self, optimizer: ManagedOptimizer, value: float) -> None:
        self._updates.schedule.check_clipping()
        self._unfreezing.admit_all(optimizer, self.kept)
        bound = value * self.scaling.scale
        doing = f"clip_grad_by_value({value})"
        found = find_gradients(self._updates.collect(doing), _parameters(optimizer))
        with all_or_none(self.manager.together.communicator, f"the values of {doing}"):
            for chunk, position in found:
                assert chunk.gradient is not None
                chunk.gradient.write(position, chunk.gradient.read(position).clamp_(-bound, bound))
        for parameters in self._plain_parameters(optimizer).values():
            torch.nn.utils.clip_grad_value_(parameters, bound)

    def states(self, optimizer: ManagedOptimizer) -> OptimizerStates:
        return self._states.shown(optimizer)

    def replace_states(self, optimizer: ManagedOptimizer, states: Mapping[Any, Any]) -> None:
        self._states.replace(optimizer, states)

    def state_dict(self, optimizer: ManagedOptimizer) -> dict[str, Any]:
        return self._states.state_dict(optimizer)

    def load_state_dict(self, optimizer: ManagedOptimizer, state_dict: dict[str, Any]) -> None:
        self.averages.refuse_swapped("load_state_dict")
        self._states.load_state_dict(optimizer, state_dict)
        self.state_id.loaded(OPTIMIZER, None)

    # -- helpers

    def _plain_parameters(self, optimizer: ManagedOptimizer) -> dict[int, list[Tensor]]:
        """Parameters with a gradient that are in no chunk (fp64, say), by group."""
        return {
            i: parameters
            for i, group in enumerate(optimizer.param_groups)
            if (parameters := [p for p in group["params"] if self.manager.find(p) is None and p.grad is not None])
        }


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that cannot be undone."""

    updates: Sequence[Planned]
    """Those of chunks."""
    left: deque[Callable[[], None]]
    """What else belongs to it."""


def _do_all(left: deque[Callable[[], None]]) -> None:
    """Do what is left, and take away what is done."""
    while left:
        left[0]()
        left.popleft()


def _parameters(optimizer: ManagedOptimizer) -> Set[int]:
    """ids of the parameters that an optimizer has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
