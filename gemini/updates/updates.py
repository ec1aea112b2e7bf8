"""From a gradient to the update of its chunk: the parts of this folder, put together.

::

    autograd --gradient_arrived--> Gradients --> UpdateSchedule --chunks to update now--> the engine --update--> Updater
                                       '------------------ optimizer.step() ------collect, plan, start------------^
"""

from collections.abc import Container, Sequence, Set
from functools import partial

from torch import Tensor

from ..chunk import Chunk, ChunkManager, all_or_none
from ..errors import RankError
from ..nn.optimizer.managed import ManagedOptimizer
from .ahead import Ahead
from .commitment import surely
from .gradients import Gradients
from .options import Options
from .scaling import Scaling
from .schedule import UpdateSchedule
from .updater import Groups, Planned, Updater


class Updates:
    """Leads gradients into chunks, and chunks to their updates.

    Parameters
    ----------
    manager, schedule, gradients, updater
        The chunks, when they are updated, what ``p.grad`` shows of their gradients, and what starts an update.
    ahead
        Begins updates before the step.
    scaling
        What gradients are multiplied by.
    options
        What the optimizer says of its updates; None for inference.
    """

    def __init__(
        self,
        manager: ChunkManager,
        schedule: UpdateSchedule,
        gradients: Gradients,
        updater: Updater,
        ahead: Ahead,
        scaling: Scaling,
        options: Options | None,
    ) -> None:
        self.schedule = schedule
        self.gradients = gradients
        self.scaling = scaling
        self.arrivals = 0
        """How many gradients autograd has brought so far."""
        self._manager = manager
        self._updater = updater
        self._ahead = ahead
        self._options = options
        self._groups: Groups | None = None
        """Those of the step under way, if backward has updated a chunk of it."""

    def serve(self, optimizer: ManagedOptimizer) -> None:
        """Take the options from this optimizer from now on."""
        self._options = Options.of(optimizer)

    def follow(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Take the gradients of parameters that have room for them in their chunks. Returns those that are new."""
        new = self.gradients.follow(parameters)
        self.schedule.follow(new)
        return new

    # -- backward

    def before_backward(self) -> None:
        """Raise if a backward cannot be a part of the step under way, or would add to gradients that are used up."""
        self.schedule.check_whole("run a second backward")
        self.gradients.before_backward()

    def backward_begins(self, task: int) -> None:
        """A backward (or one within it) comes to its first node."""
        if self.schedule.backward_begins(task):
            self._ahead.backward_begins()
            self.before_backward()

    def gradient_arrived(self, parameter: Tensor, task: int) -> Sequence[Chunk]:
        """Autograd has put a gradient into ``p.grad``. Returns chunks to `update` now."""
        self.arrivals += 1
        slot = self.gradients.slot(parameter)
        chunk, position = slot.chunk, slot.position
        arrival = slot.take(self.gradients.leaves_theirs)
        if arrival is None:
            return ()
        self.schedule.gradient_arrives(chunk, position)
        slot.put(*arrival)
        self.backward_begins(task)  # a parameter that the loss itself uses comes before any unit
        return self.schedule.gradient_arrived(chunk, position)

    def contribute(self, parameters: Sequence[Tensor]) -> None:
        """Have gradients that came before these parameters were followed be this rank's part of the sums.

        What several backwards have added to them is one term then.
        """
        for slot in map(self.gradients.slot, parameters):
            if slot.chunk.is_shared and (arrival := slot.take(leaves_theirs=False)) is not None:
                slot.put(*arrival)

    def update(self, chunk: Chunk, refresh: bool) -> None:
        """Update a chunk that the schedule has named.

        Parameters
        ----------
        refresh
            Write through to the full copy: the next forward will find it.
        """
        assert self._options is not None and chunk.gradient is not None
        if not self.schedule.consumes_gradients:
            self._ahead.begin(chunk, self._options, refresh)
            return
        if self._groups is None or not self.schedule.updated_early:
            self._groups = self._updater.groups(self._options)
        if chunk.gradient.is_file:
            self._manager.device.synchronize()
        self._manager.quiet(chunk)
        planned = self._updater.plan(self._groups, chunk, refresh=refresh)
        if not planned.is_empty:
            self.schedule.updating(chunk, max(planned.taken.values(), default=0), self._options)
            self.start([planned])
            self.wait_for_holders([planned])

    # -- the step

    def before_step(self, optimizer: ManagedOptimizer) -> None:
        """Check that the step can be completed as it was begun."""
        self.serve(optimizer)
        self.schedule.before_step(Options.of(optimizer))

    def collect(self, doing: str) -> list[Chunk]:
        """Take over what the user has done to gradients, and sum those of all ranks. Returns the chunks that have some.

        Parameters
        ----------
        doing
            What they are collected for, in words: all ranks must be doing the same.

        Raises
        ------
        RankError
            If they are not, or a backward has failed on one of them. The gradients are dropped then, on all.
        """
        self._stored()
        together, early = self._manager.together, self.schedule.updated_early
        try:
            has_changed = together.collect_gradients(doing, self.gradients.have_changed)
        except RankError:
            self.drop()
            raise
        if has_changed:  # no rank reads gradients of others before it, and none reads old ones after it
            with all_or_none(together.communicator, f"the changed gradients of {doing}"):
                self.gradients.collect(early)
        chunks = [c for c in self._manager.chunks if c.gradient is not None and c.gradient.present]
        self._stored()  # what the user replaced, or other owners have sent, may be on its way
        for chunk in chunks:
            self._manager.quiet(chunk)  # an error of the last step surfaces before anything of this one is changed
        return chunks

    def _stored(self) -> None:
        """Return when gradients are where they belong. What could not be written stops updates ahead of it, too."""
        try:
            self._manager.device.synchronize()
        except BaseException:
            self._ahead.call_off()  # the step, tried again, would take them and tell the same error once more
            raise

    def start(self, planned: Sequence[Planned]) -> None:
        """Start updates, in this order; from now on the chunks' gradients are theirs."""
        assert self._options is not None
        if self.schedule.consumes_gradients:
            self._updater.start(planned)
        else:
            self._updater.start(planned, partial(self._ahead.take, planned, self._options))
        for each in planned:
            surely(self._hand_over, each.chunk)
        self._manager.together.communicator.advance()  # those who hold memory are to see what other owners update, too

    def _hand_over(self, chunk: Chunk) -> None:
        if chunk.gradient is not None and chunk.gradient.present:
            self.gradients.hand_over(chunk)

    def after_step(self) -> None:
        """Every parameter has taken the step."""
        self.schedule.after_step()

    def wait_for_holders(self, planned: Sequence[Planned]) -> None:
        """See `Updater.wait_for_holders`."""
        self._updater.wait_for_holders(planned)

    # -- gradients that are not wanted

    def drop(self, parameters: Set[int] | None = None, failure: str = "") -> None:
        """Forget gradients in chunks; those of all parameters, or of these (ids). ``failure`` says why, if one did it.

        Raises
        ------
        ValueError
            If the optimizer has used some of it already, within backward.
        """
        self.schedule.check_dropping()
        chunks, device = self._manager.chunks, self._manager.device
        kept = set() if parameters is None else {chunk for chunk in chunks if _others(chunk, parameters)}
        if kept:
            self._ahead.call_off()
            device.synchronize()
            self._drop(kept, parameters)
        else:
            self._ahead.gradients_dropped()
            device.discard()
            with self._manager.together.communicator.forgetting_gradients(failure):
                self._drop(kept, parameters)
        self.scaling.forget()

    def _drop(self, kept: Set[Chunk], parameters: Set[int] | None) -> None:
        """Forget all gradients; in the chunks that are kept only those of some parameters (ids)."""
        for chunk in self._manager.chunks:
            if chunk in kept:
                assert parameters is not None
                self.gradients.drop(chunk, parameters)
            elif chunk.gradient is not None:
                had_some = bool(chunk.gradient.present)
                self.gradients.drop(chunk)
                if had_some:
                    self._manager.gradient_pool.release(chunk.gradient)
                chunk.gradient.clear()

    def abandon(self, failure: str) -> None:
        """A backward has failed, for the reason given: its gradients are worth nothing."""
        if self.schedule.backward_failed():
            self.drop(failure=failure)

    def zero(self, parameters: Set[int] | None = None) -> None:
        """Fill gradients with zeros; those of all parameters, or of these (ids)."""
        if self._manager.together.communicator.owner.is_alone:
            self.gradients.collect_ours(self.schedule.updated_early)  # what is theirs is zeroed where it is
        self.gradients.zero(parameters)


def _others(chunk: Chunk, parameters: Container[int]) -> bool:
    """True if a chunk has gradients of other parameters than these (ids)."""
    return chunk.gradient is not None and any(
        id(chunk.bindings[position].parameter) not in parameters for position in chunk.gradient.present
    )
