"""Saved tensors block by block: kept, moved, or computed again, as a policy says of each forward (a `Saving`).

One pair of hooks is on for the time of a call of the model, and asks which block runs. Where nothing has to be done
there is no hook: neither for saved tensors nor on blocks.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..memory.non_model import Batch
from ..planning.activation_choice import Choice, UnitCost
from ..signals import uninterrupted
from ..torch_private import current_backward, saving_hooks, saving_is_taken, storage_key, without_torch_function
from ..units.bracket import Bracket, bracket
from .advice import REST, Advice, Forward
from .counts import ActivationCounts
from .escapes import Escapes, Watch
from .inputs import InputCopies
from .leavers import Leavers
from .module_state import Place
from .recompute import RecomputedVisit
from .repeatable import Reason, why_not
from .saving import Offload, explain_transforms
from .tensors import KeptTensor, Packed, unpack

logger = logging.getLogger(__name__)


class ByBlock:
    """Asks a policy at each forward, and does what it says.

    Parameters
    ----------
    model, blocks
        The model, for the names of its blocks; and these. Both are referred to weakly: what ends the threads of a model
        that is gone refers to this.
    policy, advice
        The policy, by its name and what it says.
    leavers
        Says what may move, and what is model data.
    offload
        Moves tensors; None if there is no tier below.
    counts
        Where there is none: go on with these; None: begin.
    """

    keeps_until_short = False

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        policy: str,
        advice: Advice,
        leavers: Leavers,
        offload: Offload | None,
        counts: ActivationCounts | None = None,
    ) -> None:
        self._policy = policy
        self.counts = offload.counts if offload is not None else counts or ActivationCounts()
        self._advice = advice
        self._leavers = leavers
        self._offload = offload
        names = {module: name for name, module in model.named_modules()}
        self._blocks = [_Block(index, names[module], ref(module)) for index, module in enumerate(blocks)]
        self._brackets: dict[_Block, Bracket] = {}
        self._copies = InputCopies()
        self._told: set[str] = set()
        self._hook = self._pack
        """The same object each time: by it our own hooks are known."""
        self._forward: Forward | None = None
        self._call: ExitStack | None = None
        """Of the call of the model that is under way."""
        self._running: _Running | None = None
        self._rest = _Tally()

    # -- the model's forward

    @contextmanager
    def of_call(self) -> Iterator[None]:
        if self._call is not None or saving_is_taken():
            yield
            return
        try:
            try:
                with explain_transforms(self._policy), ExitStack() as self._call:
                    yield
                if self._forward is not None and self._forward.is_measured:
                    self._advice.ended(self._rest.nbytes, self._rest.movable_bytes)
            finally:
                self._end_call()
        finally:
            self._end_call()  # an interrupt may have come before the end of the one above
        if self._offload is not None:
            self._offload.settle()

    @uninterrupted
    def _end_call(self) -> None:
        if self._running is not None and self._running.watch is not None:
            self._running.watch.end()
        if self._call is not None:
            self._call.close()  # an interrupt may have come before the context was left
        self._call = self._running = self._forward = None

    def begin(self, batch: Batch) -> None:
        if self._call is None or self._forward is not None or not torch.is_grad_enabled():
            return
        self._forward = self._advice.begin(batch)
        if self._offload is not None:
            self._offload.begin(batch)
        if self._forward is None:
            self._remove_brackets()
            return
        self._rest = _Tally()
        for block in self._blocks:
            module = block.module()
            if block not in self._brackets and module is not None:
                self._brackets[block] = bracket(module, partial(self._before, block), partial(self._after, block))
        self._call.enter_context(saved_tensors_hooks(self._hook, unpack))

    def _remove_brackets(self) -> None:
        for block, installed in list(self._brackets.items()):
            if installed.hooks:  # else it is on a compiled module, for good
                installed.remove()
                del self._brackets[block]

    # -- a block's forward

    def _before(self, block: "_Block", module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._running is not None:
            self._running.enter(block)
            return
        hooks = saving_hooks()
        if self._forward is None or current_backward() != -1 or hooks is None or hooks[0] is not self._hook:
            return  # run again by backward, without gradients, or within hooks of the user's, as of a checkpoint
        choice = self._forward.choice(block.index)
        visit = None
        if (choice.recomputes and block.reason is None) or self._forward.is_measured:
            visit = RecomputedVisit(block.name, module, args, kwargs, block.changing)
        watch = Watch(module, visit.inputs, block.escapes) if visit is not None else None
        self._running = _Running(block, choice, visit, watch)

    def _after(self, block: "_Block", module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running = self._running
        if running is None or not running.leave(block):
            return
        self._running = None
        seconds = time.perf_counter() - running.begin
        self._advice.block_took(block.index, seconds)
        visit = running.visit
        if visit is None or running.watch is None:
            return
        running.watch.end()
        reason = block.reason or why_not(module) or visit.why_held() or block.lets_escape(running.watch.found(output))
        if reason is not None:
            self._note(block, reason)
        choice = running.choice
        if self._forward is not None and self._forward.is_measured and output is not None:
            choice = self._forward.block_ended(running.cost(seconds, reason is None))
        self._end(visit, choice, reason is None and output is not None)

    def _end(self, visit: RecomputedVisit, choice: Choice, can_run_again: bool) -> None:
        move = self._offload.pack if self._offload is not None and choice.moves else None
        if choice.recomputes and can_run_again:
            visit.drop(self._copies, move or KeptTensor)
            return
        visit.hold()
        if move is None and choice.recomputes and self._offload is not None:
            move = self._offload.pack  # it was to be out of the way
        if move is not None:
            for saved in visit.saved:
                saved.move(move)

    def _note(self, block: "_Block", reason: Reason) -> None:
        block.cannot(reason)
        if block.reason is not None and reason.text not in self._told:
            self._told.add(reason.text)
            logger.warning(
                "what %s saves for backward is not computed again but stays in memory or moves: %s; "
                "other blocks that do the same are not named", block.name, reason.text,
            )  # fmt: skip

    # -- a tensor is saved

    @uninterrupted
    def _pack(self, tensor: Tensor) -> Packed:
        running, forward = self._running, self._forward
        if forward is not None and forward.is_measured:
            with without_torch_function():
                (running.tally if running is not None else self._rest).add(tensor, self._leavers)
        if running is not None and running.visit is not None:
            return running.visit.save(tensor, KeptTensor)
        choice = running.choice if running is not None else Choice.KEEP if forward is None else forward.choice(REST)
        if choice is not Choice.KEEP and self._offload is not None:
            return self._offload.pack(tensor)
        return KeptTensor(tensor)

    # -- the rest of a `Saving`

    def ran_short(self, others_help: bool) -> bool:
        return self._advice.ran_short()

    def rest(self, seconds: float = 0.0) -> None:
        if self._offload is not None:
            self._offload.rest(seconds)

    def close(self) -> None:
        self._remove_brackets()
        if self._offload is not None:
            self._offload.close()


@dataclass(slots=True, eq=False)
class _Block:
    index: int
    name: str
    module: ref[nn.Module]
    reason: Reason | None = None
    """Why its forward must not run again; None if it may, as far as is known."""
    changing: tuple[Place, ...] = ()
    escapes: Escapes = Escapes.UNKNOWN

    def lets_escape(self, escapes: Escapes) -> Reason | None:
        """What was found in a forward, and why that must not run again, if it must not."""
        self.escapes = escapes
        if escapes is Escapes.SOME:
            return Reason("it leaves tensors with a graph where its caller does not see them")
        if escapes is Escapes.UNKNOWN:
            return Reason("it has made another graph than the one that was watched", is_passing=True)
        return None

    def cannot(self, reason: Reason) -> None:
        """It could not run again this time: for good, unless that passes, or copies of what it changes will do."""
        if reason.is_passing:
            return
        if reason.changing and not set(reason.changing) <= set(self.changing):
            self.changing = (*self.changing, *reason.changing)
        else:
            self.reason = reason


@dataclass(slots=True, eq=False)
class _Running:
    """The block whose forward is under way."""

    block: _Block
    choice: Choice
    visit: RecomputedVisit | None
    watch: Watch | None
    begin: float = field(default_factory=time.perf_counter)
    tally: "_Tally" = field(default_factory=lambda: _Tally())
    _calls: int = 1
    """It may call itself."""

    def enter(self, block: _Block) -> None:
        """A block begins within it."""
        self._calls += block is self.block

    def leave(self, block: _Block) -> bool:
        """A block ends; True if it is this one."""
        self._calls -= block is self.block
        return not self._calls

    def cost(self, seconds: float, can_run_again: bool) -> UnitCost:
        assert self.visit is not None
        return UnitCost(
            unit=self.block.index,
            saved_bytes=self.tally.nbytes,
            movable_bytes=self.tally.movable_bytes,
            forward_seconds=seconds,
            input_bytes=sum(t.nbytes for t in self.visit.inputs),
            can_recompute=can_run_again,
        )


class _Tally:
    """Bytes that were saved, each storage once."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.movable_bytes = 0
        self._seen: set[int] = set()

    def add(self, tensor: Tensor, leavers: Leavers) -> None:
        if tensor.layout is not torch.strided or isinstance(tensor, nn.Parameter) or leavers.is_model_data(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._seen:
            self._seen.add(key)
            self.nbytes += storage.nbytes()
            self.movable_bytes += storage.nbytes() if leavers.may_leave(tensor) else 0
