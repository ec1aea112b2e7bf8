"""What a boosted optimizer does: unscale, clip, and hand each chunk's update to the queue."""

import logging
from collections.abc import Container, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from ..chunk import QUIET, Chunk, ChunkManager, Communicator
from ..engine import Engine, StepFacts
from ..nn.optimizer.managed import ManagedOptimizer
from ..packing.packing import Packing
from ..updates.gradient_norm import Found, clip_coefficient, first_nonfinite, total_norm
from ..updates.options import Options
from ..updates.updater import Updater
from ..updates.updates import Updates
from .kept_states import KeptStates
from .scaler import LossScaler
from .state_mapping import OptimizerStates
from .states import States
from .succession import check_room
from .unfreezing import Unfreezing

logger = logging.getLogger(__name__)


class ChunkedStep:
    """The optimizer step over chunks (a `ManagedStep`).

    Parameters
    ----------
    manager, engine, updater, updates, communicator
        Has gradients and states, knows the order of use, plans updates, leads gradients to them, agrees among ranks.
    scaler
        The loss scale of fp16; None for dtypes that need none.
    max_norm
        Clip the gradients' 2-norm in every step; 0 for never.
    unfreezing
        Makes room for parameters that are added later.
    kept
        Has the states of parameters in chunks.
    """

    def __init__(
        self,
        manager: ChunkManager,
        engine: Engine,
        updater: Updater,
        updates: Updates,
        communicator: Communicator,
        scaler: LossScaler | None,
        max_norm: float,
        unfreezing: Unfreezing,
        kept: KeptStates,
    ) -> None:
        self.manager = manager
        self._states = States(kept)
        self.scaler = scaler
        self.skipped_steps = 0
        self.grad_norm: float | None = None
        """The last norm computed, unscaled."""
        self._engine = engine
        self._updater = updater
        self._updates = updates
        self._communicator = communicator
        self._max_norm = max_norm
        self._unfreezing = unfreezing

    @property
    def kept(self) -> KeptStates:
        """The states of parameters in chunks."""
        return self._states.kept

    @property
    def packing(self) -> Packing:
        """The plans of the chunks, as they are now."""
        return self._unfreezing.packing

    def facts(self, step: StepFacts) -> StepFacts:
        """What is known of a step, with the numbers of now."""
        loss_scale = None if self.scaler is None else self.scaler.scale
        return step._replace(skipped_count=self.skipped_steps, loss_scale=loss_scale, grad_norm=self.grad_norm)

    # -- backward

    def backward(self, loss: Tensor) -> None:
        """Run backward on the (scaled) loss; after an exception nothing stays pinned and its gradients are dropped."""
        self._updates.before_backward()
        if self.scaler is not None:
            self._updates.factor.scale()
            loss = loss * self.scaler.scale
        try:
            loss.backward()
        except BaseException as error:
            self._engine.backward_failed(error)
            raise

    def zero_gradients(self, set_to_none: bool, parameters: Set[int] | None = None) -> None:
        """Forget what is in the chunks, or fill it with zeros; see `torch.optim.Optimizer.zero_grad`.

        Parameters
        ----------
        parameters
            Of these (ids); None for all.
        """
        if set_to_none or self._updates.schedule.consumes_gradients:
            self._updates.drop(parameters)
        else:
            self._updates.zero(parameters)

    # -- ManagedStep

    def step(self, optimizer: ManagedOptimizer) -> None:
        self._engine.recover()
        with self._engine.lock:
            self._step(optimizer)
        self._engine.step_ended(self.facts)

    def _step(self, optimizer: ManagedOptimizer) -> None:
        self._engine.pins.release_held()
        # All that can fail comes first, then what cannot: a step is all or nothing, and can be repeated after an error.
        self._updates.before_step(optimizer)
        self._unfreezing.admit_all(optimizer, self.kept)
        groups = self._updater.groups(Options.of(optimizer))
        chunks = self._updates.collect()
        plain = self._plain_parameters(optimizer)
        scale = self._scale
        coefficient = self._updates.factor.clipping
        if self.scaler is not None or self._max_norm > 0:
            found = _found(chunks, groups.of)
            outside = [parameter for parameters in plain.values() for parameter in parameters]
            norm = total_norm(self.manager, [*_in_model_order(found), *outside], 2.0) / scale
            self.grad_norm = float(norm)
            if self.scaler is not None and self._overflowed(norm, found):
                return
            if self._max_norm > 0:
                coefficient *= clip_coefficient(norm, self._max_norm)
        grad_scale = coefficient / scale

        planned = [self._updater.plan(groups, chunk, grad_scale) for chunk in chunks]
        updates = [each for each in planned if not each.is_empty]
        order = self._engine.pacing.use_order()
        updates.sort(key=lambda update: order[update.chunk.index])
        prepared = [
            step
            for index, parameters in plain.items()
            for step in optimizer.prepare_parameters(optimizer.param_groups[index], parameters, grad_scale)
        ]
        self._updates.start(updates)
        optimizer.commit_parameters(prepared)
        self._updates.factor.stepped()
        if self.scaler is not None:
            self.scaler.update(overflow=False)
        self._updates.after_step()
        self._prefetch()

    @property
    def _scale(self) -> float:
        return self.scaler.scale if self.scaler is not None and self._updates.factor.is_scaled else 1.0

    def _prefetch(self) -> None:
        try:
            self._engine.pacing.prefetch_next_cycle()
        except (OSError, RuntimeError, MemoryError) as error:  # whoever needs the chunk fetches it, and says so if not
            logger.debug("nothing is fetched ahead of the next forward: %s", error)

    def _overflowed(self, norm: Tensor, found: Iterable[Found]) -> bool:
        assert self.scaler is not None
        if not bool(self._communicator.agree_max((~torch.isfinite(norm)).float())):
            return False
        before = self.scaler.scale
        self.scaler.update(overflow=True)
        self.skipped_steps += 1
        logger.info(
            "step skipped: the gradient of %s overflows fp16 at loss scale %g; the scale is now %g",
            first_nonfinite(found),
            before,
            self.scaler.scale,
        )
        self._updates.factor.stepped()
        return True

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
        self._updates.collect()
        norm = total_norm(self.manager, parameters, norm_type) / self._scale
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {float(norm)}, so they cannot be clipped"
            )
        self.grad_norm = float(norm)
        self._updates.factor.clip(clip_coefficient(norm, max_norm))
        return norm

    def clip_grad_by_value(self, optimizer: ManagedOptimizer, value: float) -> None:
        self._updates.schedule.check_clipping()
        self._unfreezing.admit_all(optimizer, self.kept)
        bound = value * self._scale
        for chunk, position in _found(self._updates.collect(), _parameters(optimizer)):
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
        self._states.load_state_dict(optimizer, state_dict)

    # -- helpers

    def _plain_parameters(self, optimizer: ManagedOptimizer) -> dict[int, list[Tensor]]:
        """Parameters with a gradient that are in no chunk (fp64, say), by group."""
        return {
            i: parameters
            for i, group in enumerate(optimizer.param_groups)
            if (parameters := [p for p in group["params"] if self.manager.find(p) is None and p.grad is not None])
        }


def _parameters(optimizer: ManagedOptimizer) -> Set[int]:
    """ids of the parameters that an optimizer has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _found(chunks: Iterable[Chunk], parameters: Container[int]) -> list[Found]:
    """The gradients of these parameters (ids), which are those that the step uses."""
    return [
        (chunk, position)
        for chunk in chunks
        if chunk.gradient is not None
        for position in sorted(chunk.gradient.present)
        if id(chunk.bindings[position].parameter) in parameters
    ]


def _in_model_order(found: Iterable[Found]) -> list[Tensor]:
    """The parameters of these gradients."""
    in_order = sorted(found, key=lambda place: place[0].layout.slots[place[1]].key)
    return [chunk.bindings[position].parameter for chunk, position in in_order]
