"""From a chunk's gradients to its update under way: which step each parameter takes, and what that makes stale."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor

from ..chunk import BufferSpec, Chunk, ChunkManager, ChunkState, Slot
from ..nn.optimizer.rules.rule import BoundRule, BoundSideUpdate, BoundUpdate, Form
from .averages import UNCHANGED, Averages
from .commitment import surely
from .options import Options
from .ticket import Ticket
from .update_pipeline import ChunkUpdate, Run
from .update_queue import Prepared, UpdateQueue


class GroupRule:
    """A parameter group's arithmetic, with the options that it has now.

    Parameters
    ----------
    bind
        Makes the update of one step.
    keeps_state
        Whether a step of it is counted.
    is_whole
        Whether it takes whole parameters.
    has_sides
        Whether its parameters may have side states.
    """

    def __init__(self, bind: BoundRule, keeps_state: bool, is_whole: bool = False, has_sides: bool = False) -> None:
        self.keeps_state = keeps_state
        self.is_whole = is_whole
        self.has_sides = is_whole or has_sides
        self._bind = bind
        self._bound: dict[tuple[Hashable, ...], BoundUpdate] = {}

    def at(self, step: int, grad_scale: float, is_fresh: bool, form: Form | None = None) -> BoundUpdate:
        """The update of a step: one object for all parameters that take the same."""
        if self.is_whole:
            return self._bind(step, grad_scale, is_fresh, form)
        numbers = () if form is None else tuple(float(value) for value in form.side.values())
        key = step, grad_scale, is_fresh, numbers
        if key not in self._bound:
            self._bound[key] = self._bind(step, grad_scale, is_fresh, form)
        return self._bound[key]


@dataclass(frozen=True, slots=True)
class Groups:
    """The optimizer's parameter groups as they are now, which need not be those of the packing."""

    of: Mapping[int, int]
    """id of a parameter -> the index of its group. Those that have been taken out of theirs are not updated."""
    rules: Mapping[tuple[int, tuple[BufferSpec, ...]], GroupRule]
    """By the index of a group, and the states of a chunk with a parameter of it."""

    def of_chunk(self, chunk: Chunk) -> dict[int, GroupRule]:
        """The rules of the groups that a chunk may have parameters of, by their index."""
        return {index: rule for (index, kept), rule in self.rules.items() if kept == chunk.states}


@dataclass(frozen=True, slots=True)
class Planned:
    """An update that has not been started, and the counts of steps after it."""

    update: ChunkUpdate
    taken: Mapping[int, int]
    is_empty: bool
    """No parameter of the chunk takes a step, wherever its elements are at home."""
    terms: Sequence[tuple[int, int, int, float, bool, tuple[float, ...]]] = ()
    """Of each parameter that takes a step: its position, its group, the number of the step, what the gradient is
    multiplied by, whether its states begin, and its side states. With the options of the groups they say all that is
    computed."""
    sides: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    """Side states after it, by the id of the parameter."""

    @property
    def chunk(self) -> Chunk:
        return self.update.chunk


class Updater:
    """Plans updates, which may fail, and starts them, which may not.

    Parameters
    ----------
    manager, queue
        Has the chunks, and does the updates.
    """

    def __init__(self, manager: ChunkManager, queue: UpdateQueue) -> None:
        self.steps: dict[int, int] = {}
        """id of a parameter that has a state -> how many steps it has taken. Where the rule does not count, the number
        means nothing; where it does, it may be 0, if somebody has set it."""
        self.sides: dict[int, dict[str, Tensor]] = {}
        """id of a parameter -> its side states, if the optimizer keeps some. Updates under way replace those of whole
        rules."""
        self.averages = Averages()
        self._manager = manager
        self._queue = queue

    @property
    def can_stream(self) -> bool:
        """True if homes on DISK can be updated."""
        return self._queue.can_stream

    def groups(self, options: Options) -> Groups:
        """The arithmetic of each group.

        Raises
        ------
        ValueError
            If an option is out of range, or needs a state that there is no room for.
        """
        groups = options.param_groups
        of = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
        rules: dict[tuple[int, tuple[BufferSpec, ...]], GroupRule] = {}
        for chunk in self._manager.chunks:
            if chunk.is_trainable:
                states = chunk.states
                for index in {of.get(id(binding.parameter)) for binding in chunk.bindings}:
                    if index is not None and (index, states) not in rules:
                        group, rule = groups[index], options.rules.of_group(groups[index])
                        bound = rule.bind(group, states)
                        has_sides = bool(rule.side((1,)))
                        rules[index, states] = GroupRule(bound, rule.keeps_state(group), rule.is_whole, has_sides)
        return Groups(of, rules)

    def plan(self, groups: Groups, chunk: Chunk, grad_scale: float = 1.0, refresh: bool = True) -> Planned:
        """The next step of the parameters of a chunk that have a gradient. Changes nothing but full copies.

        Parameters
        ----------
        groups
            The optimizer's.
        refresh
            Write through to the full copy, if there is one. Else it is evicted (which is free).
        """
        taken: dict[int, int] = {}
        runs: list[Run] = []
        terms: list[tuple[int, int, int, float, bool, tuple[float, ...]]] = []
        sides: dict[int, Mapping[str, Tensor]] = {}
        gradient = chunk.gradient
        assert gradient is not None
        previous, is_empty = -2, True
        rules = groups.of_chunk(chunk)
        for position in sorted(gradient.present):
            slot, parameter = chunk.layout.slots[position], chunk.bindings[position].parameter
            index = groups.of.get(id(parameter))
            if index is None:
                continue
            group = rules[index]
            step, is_fresh = self.steps.get(id(parameter), 0) + 1, id(parameter) not in self.steps
            if group.keeps_state:
                taken[id(parameter)] = step
            form = self._form(slot, parameter) if group.has_sides else None
            at_step = group.at(step, grad_scale, is_fresh, form)
            numbers: tuple[float, ...] = ()
            if form is not None and not group.is_whole:
                numbers = tuple(float(value) for value in form.side.values())
                sides[id(parameter)] = cast(BoundSideUpdate, at_step).side_after()
            terms.append((position, index, step, grad_scale, is_fresh, numbers))
            is_empty = False
            start, stop = max(slot.offset, chunk.extent.start), min(slot.stop, chunk.extent.stop)
            if start >= stop:  # other owners update all of it
                continue
            if runs and position == previous + 1 and runs[-1].at_step is at_step and gradient.continues(position):
                runs[-1] = Run(runs[-1].start, stop, at_step)  # the zeros between them stay zeros
            else:
                runs.append(Run(start, stop, at_step, is_whole=group.is_whole))
            previous = position
        runs = [replace(run, gradient=gradient.memory(run.start, run.stop)) for run in runs]
        averages = self.averages.of(chunk)
        if averages:
            runs, is_empty = _without_gaps(runs, chunk.extent), False
        update = ChunkUpdate(chunk, tuple(runs), self._refreshed(chunk, refresh), averages)
        return Planned(update, taken, is_empty, terms, sides)

    def _form(self, slot: Slot, parameter: Tensor) -> Form:
        return Form(slot.shape, slot.stride, self.sides.setdefault(id(parameter), {}))

    def plan_averages(self, chunk: Chunk) -> Planned:
        """Have the averages of a chunk go on that no gradient has come to."""
        self._manager.full_copies.arrive(chunk)
        runs = _without_gaps([], chunk.extent)
        return Planned(ChunkUpdate(chunk, tuple(runs), None, self.averages.of(chunk)), {}, not runs)

    def _refreshed(self, chunk: Chunk, refresh: bool) -> Tensor | None:
        """The full copy to write through to; where the kernel cannot reach it, it is evicted instead (free)."""
        if chunk.full_is_home or not chunk.is_resident:
            return None
        if (refresh or chunk.is_lent) and chunk.plan.update_reaches_full:
            if chunk.state is ChunkState.FETCHING:
                self._manager.pin(chunk)
                chunk.unpin()
            return chunk.full
        self._manager.evict(chunk)
        return None

    def start(self, planned: Sequence[Planned], take: Callable[[], Mapping[Chunk, Ticket]] = dict) -> None:
        """Hand updates to the queue, in this order.

        Parameters
        ----------
        take
            Takes those of them that have begun already, which cannot be undone: called when all else is ready.
        """
        caller = self._manager.device.caller()
        prepared = {each.chunk: self._queue.prepare(each.update, caller) for each in planned}
        left, order = dict(prepared), [each.chunk for each in planned]
        begun = take()
        for chunk in begun:
            del left[chunk]
        self._add(left, is_certain=bool(begun))
        if begun:
            surely(self._queue.arrange, order)
        for each in planned:
            surely(self._begin, each, prepared[each.chunk].ticket, begun.get(each.chunk))

    def _add(self, left: Mapping[Chunk, Prepared], is_certain: bool) -> None:
        if is_certain:
            self._queue.add(surely(list, left.values()), is_certain=True)
        else:
            self._queue.add(list(left.values()))

    def _begin(self, planned: Planned, prepared: Ticket, begun: Ticket | None) -> None:
        """Note that an update is under way: as it was prepared, or one that had begun before.

        Memory that an update has which was called off is no full copy. It is freed when it is wanted.
        """
        chunk = planned.chunk
        self.steps.update(planned.taken)
        self.sides.update((parameter, dict(side)) for parameter, side in planned.sides.items())
        full_copies = self._manager.full_copies
        positions = chunk.gradient.present if chunk.gradient is not None else ()
        ticket = begun or prepared
        chunk.begin_update(ticket, positions, fills_full=begun is not None and chunk in full_copies.taken)
        if begun is not None:
            full_copies.take_over(chunk)
        self._manager.release_gradient_after(chunk, ticket)

    def wait_for_holders(self, planned: Sequence[Planned]) -> None:
        """Wait for those updates that read or write memory which code outside of the manager holds.

        What it sees is then of one step, and what it writes into a gradient comes too late for this one, as in plain
        PyTorch.
        """
        for each in planned:
            chunk = each.chunk
            if chunk.pins or chunk.is_lent or (chunk.is_split and chunk.loan is not None):
                chunk.settle()
                if each.update.out is None and chunk.is_resident and not chunk.full_is_home:
                    self._manager.full_copies.fill_again(chunk)  # the update could not write through to it
                if chunk.loan is not None:
                    chunk.loan.remember_all()
            elif chunk.gradient is not None and chunk.gradient.is_held:
                chunk.settle()


def _without_gaps(runs: Sequence[Run], extent: range) -> list[Run]:
    """All of an extent: between these runs nothing but averages changes."""
    whole: list[Run] = []
    at = extent.start
    for run in runs:
        if at < run.start:
            whole.append(Run(at, run.start, UNCHANGED))
        whole.append(run)
        at = run.stop
    return [*whole, Run(at, extent.stop, UNCHANGED)] if at < extent.stop else whole
