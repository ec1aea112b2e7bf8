"""From a chunk's gradients to its update under way: which step each parameter takes, and what that makes stale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..chunk import Chunk, ChunkManager, ChunkState, Role, Tier
from ..nn.optimizer.managed import ManagedOptimizer
from ..nn.optimizer.rule import AtStep, StateSlot, StepMaker
from .gradients import Gradients
from .update_pipeline import ChunkUpdate, Run
from .update_queue import UpdateQueue


@dataclass(frozen=True, slots=True)
class GroupRule:
    """A parameter group's arithmetic, with the options that it has now."""

    make: StepMaker
    remembers: bool
    """Whether a step of it is counted."""


@dataclass(frozen=True, slots=True)
class Planned:
    """An update that has not been started, and the counts of steps after it."""

    update: ChunkUpdate
    taken: Mapping[int, int]

    @property
    def chunk(self) -> Chunk:
        return self.update.chunk


class Updater:
    """Plans updates, which may fail, and starts them, which may not.

    Parameters
    ----------
    manager, queue, gradients
        Has the chunks, does the updates, and knows what ``p.grad`` shows.
    """

    def __init__(self, manager: ChunkManager, queue: UpdateQueue, gradients: Gradients) -> None:
        self.steps: dict[int, int] = {}
        """id of a parameter -> how many steps it has taken; of a rule that does not count, whether it has a state."""
        self.slots: dict[int, tuple[StateSlot, ...]] = {
            chunk.layout.group.param_group: tuple(chunk.states.values())
            for chunk in manager.chunks
            if chunk.is_trainable
        }
        """By group: the states that there is room for."""
        self._group_of: dict[int, int] = {
            id(binding.parameter): chunk.layout.group.param_group
            for chunk in manager.chunks
            if chunk.is_trainable
            for binding in chunk.bindings
        }
        """id of a parameter -> its group."""
        self._manager = manager
        self._queue = queue
        self._gradients = gradients

    def admit(self, parameters: Sequence[Tensor], group: int, slots: tuple[StateSlot, ...]) -> None:
        """Update these parameters from now on, which are in chunks with room for ``slots``."""
        self.slots[group] = slots
        self._group_of.update(dict.fromkeys(map(id, parameters), group))

    def regroup(self, groups: Sequence[tuple[Sequence[Tensor], tuple[StateSlot, ...]]]) -> None:
        """Sort all parameters into these groups, each with the states that its chunks have room for."""
        self.slots = {index: slots for index, (parameters, slots) in enumerate(groups) if parameters}
        self._group_of = {id(p): index for index, (parameters, _) in enumerate(groups) for p in parameters}

    def groups(self, optimizer: ManagedOptimizer) -> list[GroupRule]:
        """The arithmetic of each group.

        Raises
        ------
        ValueError
            If an option is out of range, or needs a state that there is no room for.
        """
        rule = optimizer.rule
        return [
            GroupRule(rule.of_group(group, self.slots.get(index, rule.slots(group))), rule.remembers(group))
            for index, group in enumerate(optimizer.param_groups)
        ]

    def plan(self, groups: Sequence[GroupRule], chunk: Chunk, grad_scale: float = 1.0, refresh: bool = True) -> Planned:
        """The next step of the parameters of a chunk that have a gradient. Changes nothing but full copies.

        Parameters
        ----------
        groups
            The optimizer's.
        refresh
            Write through to the full copy, if there is one. Else it is evicted (which is free).

        Raises
        ------
        ValueError
            If a parameter with a gradient is in no group.
        """
        taken: dict[int, int] = {}
        of_step: dict[tuple[int, int], AtStep] = {}
        runs: list[Run] = []
        assert chunk.gradient is not None
        previous = -2
        for position in sorted(chunk.gradient.present):
            slot, parameter = chunk.layout.slots[position], chunk.bindings[position].parameter
            step = self.steps.get(id(parameter), 0) + 1
            index = self._group_of.get(id(parameter))
            if index is None:
                raise ValueError(
                    f"{slot.name} has a gradient and is in no group of the optimizer: add it with "
                    "optimizer.add_param_group, or freeze it with requires_grad_(False)"
                )
            if groups[index].remembers:
                taken[id(parameter)] = step
            if (index, step) not in of_step:
                of_step[index, step] = groups[index].make(step, grad_scale)
            at_step = of_step[index, step]
            if runs and position == previous + 1 and runs[-1].at_step is at_step:
                runs[-1] = Run(runs[-1].start, slot.stop, at_step)  # the zeros between them stay zeros
            else:
                runs.append(Run(slot.offset, slot.stop, at_step))
            previous = position
        return Planned(ChunkUpdate(chunk, tuple(runs), self._refreshed(chunk, refresh)), taken)

    def _refreshed(self, chunk: Chunk, refresh: bool) -> Tensor | None:
        """The full copy to write through to; where the kernel cannot reach it, it is evicted instead (free)."""
        if chunk.full_is_home or not chunk.is_resident:
            return None
        if (refresh or chunk.is_lent) and (self._manager.device.is_ram or chunk.homes[Role.MASTER].tier is Tier.DEVICE):
            if chunk.state is ChunkState.FETCHING:
                self._manager.pin(chunk)
                self._manager.unpin(chunk)
            return chunk.full
        self._manager.evict(chunk)
        return None

    def start(self, planned: Sequence[Planned]) -> None:
        """Hand updates to the queue, in this order; from now on the chunks' gradients are theirs.

        Those of chunks of which code outside of the manager holds memory are waited for: what it sees is then of one
        step, and what it writes into a gradient comes too late for this one, as in plain PyTorch.
        """
        tickets = self._queue.submit([each.update for each in planned])
        for each, ticket in zip(planned, tickets, strict=True):
            chunk = each.chunk
            assert chunk.gradient is not None
            self.steps.update(each.taken)
            chunk.update = ticket
            chunk.supersede(chunk.gradient.present)
            self._gradients.hand_over(chunk)
            self._manager.lends_until(chunk, ticket)
            if not chunk.pins:
                chunk.poison()  # until the next pin
        for each in planned:
            chunk = each.chunk
            if chunk.pins or chunk.is_lent:
                chunk.settle()
                if each.update.out is None and chunk.is_resident and not chunk.full_is_home:
                    self._manager.refresh(chunk)
            elif chunk.gradient is not None and chunk.gradient.is_held:
                chunk.settle()
