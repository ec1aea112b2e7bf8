"""Updating chunks while backward still runs (``GeminiPlugin(update_in_backward=True)``).

A chunk is updated when backward is through with it (`Completion`) and nothing has it pinned. The optimizer's step then
does the rest: chunks that a call without a part in the loss has kept waiting, and parameters outside of the chunks.

::

    WHOLE --a chunk is updated--> PARTIAL --optimizer.step()--> WHOLE
                                     |
                                     '--backward fails--> TORN --all values are loaded--> WHOLE

Gradients are gone before anyone could look at all of them. What needs them together (clipping, a loss scale,
accumulation) is refused, before anything is updated where that is known by then.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from ..chunk import Chunk, ChunkManager, Tier, weakly
from ..errors import TornStep
from ..nn.optimizer.managed import ManagedOptimizer
from ..torch_private import current_backward
from ..units.units import Visit
from .completion import Completion
from .gradients import Gradients
from .updater import Groups, Updater


class Progress(Enum):
    """How far the optimizer's step has come."""

    WHOLE = auto()
    """Every parameter has taken the same steps."""
    PARTIAL = auto()
    """Backward has updated some chunks; ``optimizer.step()`` does the rest."""
    TORN = auto()
    """Backward failed after that: the values are of no step, until all have been replaced."""


class BackwardUpdates:
    """Which chunks the backward under way has updated, and what may not happen because of that.

    Parameters
    ----------
    manager, completion, gradients, updater
        Has the chunks, knows when backward is through with one, moves its gradients, and starts its update.
    optimizer
        Whose options count.
    keeps
        Says whether a chunk's full copy is worth writing through to: the next forward will find it.
    """

    def __init__(
        self,
        manager: ChunkManager,
        completion: Completion,
        gradients: Gradients,
        updater: Updater,
        optimizer: ManagedOptimizer,
        keeps: Callable[[Chunk], bool],
    ) -> None:
        self.progress = Progress.WHOLE
        self.update_count = 0
        """Chunks updated within a backward, since the start."""
        self._manager = manager
        self._completion = completion
        self._gradients = gradients
        self._updater = updater
        self._keeps = keeps
        self._optimizer = weakref.ref(optimizer)  # which has us
        self._groups = Groups({}, {})
        self._options: list[Mapping[str, Any]] = []
        """What the groups' options were when the first chunk of this step was updated."""
        self._updated: set[Chunk] = set()
        self._updates_here = 0
        """How many of them by the backward under way."""
        self._step = 0
        """The number of the step that is being done."""
        self._missing: set[tuple[int, str]] = set()
        """ids of parameters and names of their values that are still to be loaded after a torn step."""
        manager.withheld = gradients.used_up = self._updated
        manager.before_read = weakly(self.refuse_reading)
        manager.after_write = weakly(self._replaced)
        gradients.before_arrival = self._refuse_late
        gradients.on_arrival = self._arrived

    # -- what hooks tell

    def begin(self, task: int) -> None:
        """A backward comes to its first node."""
        is_outermost = self._completion.is_idle
        if self._completion.begin(task) and is_outermost:
            self._updates_here = 0
            self.before_backward()

    def before_backward(self) -> None:
        """Raise if there are gradients already that this backward would add to."""
        self._refuse("run a second backward")
        name = self._gradients.first_not_zeroed()
        if name is not None:
            raise ValueError(
                f"the gradient of {name} was not zeroed since the last step. Plain PyTorch would add to it, but with "
                "update_in_backward=True it is used up: call optimizer.zero_grad() before each backward"
            )

    def called(self, visit: Visit, has_graph: bool, in_backward: bool) -> None:
        """See `Completion.called`."""
        self._completion.called(visit, has_graph, in_backward)

    def before_use(self, user: str, chunks: Iterable[Chunk]) -> None:
        """Something is about to read parameters, and not through a graph that autograd watches."""
        stale = next((chunk for chunk in chunks if chunk in self._updated), None)
        if stale is not None:
            raise ValueError(
                f"{user} uses chunk {stale.index} (with {stale.layout.slots[0].name}) when backward has updated it "
                "already (update_in_backward=True). Use parameters after optimizer.step(); where backward itself runs "
                "code that forward did not show, boost without update_in_backward"
            )

    def left(self, visit: Visit) -> None:
        """Backward has been through a call of a unit."""
        self._completion.left(visit)
        for chunk in visit.chunks:
            self._consider(chunk)

    def end(self, task: int) -> None:
        """A backward is over, and the calls that it kept open are left."""
        if self._completion.end(task):
            for chunk in self._manager.chunks:
                self._consider(chunk)

    def _arrived(self, chunk: Chunk, position: int) -> None:
        task = current_backward()
        self.begin(task)  # a parameter that the loss itself uses comes before any unit
        self._completion.arrived(chunk, position, task)
        self._consider(chunk)

    def _consider(self, chunk: Chunk) -> None:
        if chunk.gradient is None or not chunk.gradient.present or chunk.pins or not self._completion.is_over(chunk):
            return
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self.progress is Progress.WHOLE:
            self._groups = self._updater.groups(optimizer)
            self._options = _options(optimizer)
        if chunk.gradient.buffer is not None and chunk.gradient.buffer.tier is Tier.DISK:
            self._manager.device.synchronize()
        chunk.settle()
        self._manager.keep_edits(chunk)
        planned = self._updater.plan(self._groups, chunk, refresh=self._keeps(chunk))
        if planned.is_empty:
            return
        self.progress = Progress.PARTIAL
        self._updated.add(chunk)
        self._updates_here += 1
        self.update_count += 1
        self._updater.start([planned])
        self._step = max(self._updater.steps.get(id(binding.parameter), 0) for binding in chunk.bindings)

    # -- the rest of the step

    def before_step(self, optimizer: ManagedOptimizer) -> None:
        """Check that the step can be completed as it was begun.

        Raises
        ------
        ValueError
            If an option has changed since.
        TornStep
            If there is no step to complete.
        """
        self.refuse_torn()
        if self.progress is not Progress.PARTIAL:
            return
        for i, (then, now) in enumerate(zip(self._options, _options(optimizer), strict=False)):
            changed = [name for name in now if name not in then or not _same(then[name], now[name])]
            if changed:
                name = changed[0]
                raise ValueError(
                    f"{name} of group {i} was {then.get(name)!r} when backward updated the first chunks, and is "
                    f"{now[name]!r} now: with update_in_backward=True change options before backward or after step(); "
                    "put it back and call step() again"
                )

    def after_step(self) -> None:
        """Every parameter has taken the step."""
        self.progress = Progress.WHOLE
        self._updated.clear()
        self._completion.forget()

    def failed(self) -> bool:
        """A backward did not come to its end; True if what it has put into chunks is worth nothing.

        It is not where the backward was a second one, and was refused: the step can still be completed.
        """
        self._completion.forget()
        if self.progress is Progress.PARTIAL and not self._updates_here:
            return False
        if self.progress is Progress.PARTIAL:
            self.progress = Progress.TORN
            self._missing = {
                (id(binding.parameter), name)
                for chunk in self._manager.chunks
                if chunk.is_trainable
                for binding in chunk.bindings
                for name in chunk.codecs
            }
        self._updated.clear()
        return True

    def _replaced(self, parameter: Tensor, name: str) -> None:
        if self.progress is Progress.TORN:
            self._missing.discard((id(parameter), name))
            if not self._missing:
                self.progress = Progress.WHOLE

    # -- refusals

    @property
    def torn_text(self) -> str:
        """What to say of a torn step; empty where there is none."""
        if self.progress is not Progress.TORN:
            return ""
        return (
            f"backward failed in step {self._step} when the optimizer had updated some chunks within it "
            "(update_in_backward=True), so parameters and optimizer states are of no single step: load a checkpoint, "
            "booster.load_model and booster.load_optimizer, and go on from there"
        )

    def refuse_torn(self) -> None:
        """Raise if the values are of no single step."""
        if self.progress is Progress.TORN:
            raise TornStep(self.torn_text)

    def refuse_reading(self) -> None:
        """Raise if there are no values of one step to be read."""
        self._refuse("read parameters or optimizer states")

    def before_forward(self) -> None:
        """Raise if a forward would run on parameters of two steps."""
        self._refuse("run a forward")

    def before_zero_grad(self) -> None:
        """Raise if the gradients that are to be forgotten have been used."""
        if self.progress is Progress.PARTIAL:
            self._refuse("forget the gradients")

    def before_adding(self) -> None:
        """Raise if parameters would be added to a step that has begun."""
        self._refuse("add parameters")

    def serve(self, optimizer: ManagedOptimizer) -> None:
        """Take the options from this optimizer from now on."""
        self._optimizer = weakref.ref(optimizer)

    def admit(self, parameters: Sequence[Tensor]) -> None:
        """Update chunks with these parameters, too, as soon as backward is through with them."""
        self._completion.follow(parameters)

    def refuse_clipping(self) -> None:
        """Raise: there never are all gradients together."""
        raise ValueError(
            "gradients cannot be clipped with update_in_backward=True: the optimizer has used most of them before all "
            "are known; boost without it"
        )

    def _refuse(self, what: str) -> None:
        self.refuse_torn()
        if self.progress is Progress.PARTIAL:
            raise ValueError(
                f"cannot {what} now: with update_in_backward=True backward has updated {len(self._updated)} chunks "
                "already, call optimizer.step() after each backward first (to accumulate gradients, boost without it)"
            )

    def _refuse_late(self, chunk: Chunk, position: int) -> None:
        if chunk in self._updated:
            raise TornStep(
                f"a gradient of {chunk.layout.slots[position].name} came after the optimizer had updated it within the "
                "same step; boost without update_in_backward"
            )


def _options(optimizer: ManagedOptimizer) -> list[Mapping[str, Any]]:
    return [
        {name: copy.deepcopy(group[name]) for name in optimizer.defaults if name in group}
        for group in optimizer.param_groups
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)
