"""One chunk: its homes, its full copy on DEVICE, and the parameters bound to it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gemini.torch_private import storage_key, version_of, without_torch_function

from .away import QUIET, Keeper, away_class, is_linked, link, plain_class
from .buffer import Buffer
from .extent import Place
from .loan import Loan
from .memory import Transfer
from .names import MASTER
from .plan import ChunkPlan
from .shared_gradient import Gradient
from .state import ChunkState, transition
from .tier import Tier


@dataclass(frozen=True, slots=True)
class Binding:
    """A parameter and the two things its data and its class may be."""

    parameter: Tensor
    view: Tensor
    """Its slot in the full copy."""
    poison: Tensor
    """A NaN scalar expanded to the same shape: no memory, and a use without the chunk cannot go unnoticed."""
    plain: type
    away: type
    """While nothing has the chunk pinned: see [Note: Away]. Without a keeper a parameter stays plain."""


class Chunk:
    """A chunk's memory and state. It does what it is told; the manager accounts, the runtime decides.

    ``full`` is one storage, resized 0 <-> n and never replaced: autograd may have saved views of it. Where home and
    full copy would be the same bytes (same dtype, same memory), they are: ``full_is_home``, and nothing moves.
    """

    def __init__(self, plan: ChunkPlan, homes: dict[str, Buffer], full: Tensor) -> None:
        self.layout = layout = plan.layout
        self.homes = homes
        """Where each buffer of the plan is, but for the gradient's."""
        self.states = plan.states
        """What the optimizer keeps here, in its own order."""
        self.codec = plan.codec
        self.codecs = plan.codecs
        self.specs = plan.specs
        self.extents = plan.extents
        """The elements of the layout that each owner keeps at home."""
        self.extent = plan.extent
        """Those that are kept at home here."""
        self._owner = plan.owner.index
        self.full = full
        self.full_is_home = plan.full_is_home
        with torch.no_grad():
            # Made now and kept: a view of a storage that is 0 bytes long cannot be made, but it can be held.
            self.views = tuple(
                full.as_strided(slot.shape, slot.stride, full.storage_offset() + slot.offset) for slot in layout.slots
            )
            self.own_full = full.narrow(0, self.extent.start, len(self.extent))
            """The part of the full copy that is at home here."""
        self.gradient: Gradient | None = None
        self.bindings: list[Binding] = []
        self._versions: list[int] = []
        """Per binding, torch's count of in-place operations when home and full copy were last the same."""
        self.state = ChunkState.HOME
        self.pins = 0
        self.last_used = 0
        self.was_prefetched = False
        self.update: Transfer | None = None
        self.loan: Loan | None = None
        """The full copy's memory, if some has been lent since home was last known to have the same values."""
        self._transfer: Transfer | None = None
        self.is_poisoned = not self.full_is_home
        """The parameters point at NaN."""

    @property
    def index(self) -> int:
        return self.layout.index

    @property
    def is_trainable(self) -> bool:
        """True if an optimizer updates it."""
        return self.gradient is not None

    @property
    def is_split(self) -> bool:
        """True if its full copy is a part of its masters: the upper halves. See [Note: Split master]."""
        return self.full_is_home and self.codec.dtype is not self.full.dtype

    @property
    def master_dtype(self) -> torch.dtype:
        """Of what a parameter is read as."""
        return self.codec.dtype

    @property
    def tier(self) -> Tier:
        """Where its masters are."""
        return self.homes[MASTER].tier

    def place(self, position: int, name: str) -> Place:
        """Where the masters or a state of a parameter are."""
        return Place.of(self.layout.slots[position], self.specs[name].block_numel, self.extents, self._owner)

    @property
    def is_whole(self) -> bool:
        """True if all of it is at home here, as without other owners."""
        return len(self.extent) == self.layout.numel

    def part(self, name: str, start: int, stop: int) -> slice:
        """Where the buffer of this name has elements ``[start, stop)`` of the layout, which are at home here."""
        first = self.extent.start
        return self.specs[name].part(start - first, stop - first) if name in self.specs else slice(start, stop)

    @property
    def source(self) -> Buffer:
        """What a fetch reads."""
        return self.homes[self.codec.source]

    @property
    def full_nbytes(self) -> int:
        """Bytes that the full copy takes on DEVICE beside the homes."""
        return 0 if self.full_is_home else self.full.numel() * self.full.element_size()

    @property
    def is_lent(self) -> bool:
        """True if code outside of the manager holds a part of the full copy. See [Note: Loans]."""
        return self.loan is not None and self.loan.is_alive()

    def lend(self) -> Loan:
        """The loan of the full copy's memory; the chunk must be on DEVICE."""
        assert self.state in (ChunkState.READY, ChunkState.IN_USE)
        if self.loan is None:
            self.loan = Loan(self.views, remembers=self.is_split)
        return self.loan

    def has_memory(self, tensor: Tensor) -> bool:
        """True if a tensor lies in the full copy, or in what was lent of it."""
        is_in_full = storage_key(tensor.untyped_storage()) == storage_key(self.full.untyped_storage())
        return is_in_full or (self.loan is not None and self.loan.has(tensor))

    @property
    def is_resident(self) -> bool:
        """True if the full copy exists or is arriving."""
        return self.state is not ChunkState.HOME

    def begin_fetch(self, transfer: Transfer) -> None:
        """HOME -> FETCHING; the manager has given ``full`` its memory."""
        self._transfer = transfer
        self._move_to(ChunkState.FETCHING)

    def finish_fetch(self) -> None:
        """FETCHING -> READY, when the data are there.

        Raises
        ------
        OffloadError
            If the move failed; the chunk is then at HOME again, without its memory.
        """
        transfer = self._transfer
        assert transfer is not None
        try:
            transfer.wait()
        except BaseException as error:
            # Another signal's handler may raise in this thread: the move then goes on, and must keep its memory.
            if isinstance(error, Exception) or transfer.done():
                self._move_to(ChunkState.HOME)
                self._transfer = None
            raise
        self._move_to(ChunkState.READY)
        self._transfer = None

    @property
    def has_arrived(self) -> bool:
        """True if `finish_fetch` would not wait."""
        return self._transfer is None or self._transfer.done()

    def rest(self, deadline: float) -> None:
        """Return when no other thread writes into its memory, by an update or by a move, or at the deadline.

        ``deadline`` is of `time.monotonic`.
        """
        for work in (self.update, self._transfer):
            if work is not None:
                work.rest(max(0.0, deadline - time.monotonic()))

    def pin(self) -> None:
        """READY or IN_USE -> IN_USE; parameters are readable until the last `unpin`."""
        if self.update is not None:
            self.settle()
        if self.pins == 0:
            if self.state is not ChunkState.IN_USE:  # it is after an interrupt of `pin` or `unpin`
                self._move_to(ChunkState.IN_USE)
            for binding in self.bindings:
                binding.parameter.__class__ = binding.plain
        self.pins += 1
        if self.is_poisoned:
            self._expose()

    def unpin(self) -> None:
        assert self.pins > 0, f"chunk {self.index} is not pinned"
        self.pins -= 1
        if self.pins == 0:
            self._move_to(ChunkState.READY)
            for binding in self.bindings:
                binding.parameter.__class__ = binding.away

    def forget_lost_pins(self, pins: int) -> None:
        """Set the number of pins to those that visits hold: an interrupt may have kept one from being noted."""
        if self.pins == pins and (self.state is ChunkState.IN_USE) == (pins > 0):
            return
        self.pins = pins
        if pins == 0 and self.state is ChunkState.IN_USE:
            self._move_to(ChunkState.READY)
        for binding in self.bindings:
            binding.parameter.__class__ = binding.plain if pins else binding.away

    def evict(self) -> None:
        """READY -> HOME. Copies nothing: the full copy is clean, or the manager has kept what was changed in it."""
        assert not self.is_lent
        self._move_to(ChunkState.HOME)
        self.loan = None
        self.poison()

    def poison(self) -> None:
        """Point the parameters at NaN (the full copy is gone, or an update is rewriting it)."""
        if not self.is_poisoned:
            self.is_poisoned = True  # first: after an interrupt the next pin has to point all of them
            with QUIET():
                for binding in self.bindings:
                    binding.parameter.data = binding.poison

    def _expose(self) -> None:
        """Point the parameters at the full copy."""
        with QUIET():
            for binding in self.bindings:
                binding.parameter.data = binding.view
        self.is_poisoned = False

    def point(self, position: int, memory: Tensor) -> None:
        """Have the parameter at this position lie in other memory for a moment; `point_back` ends that."""
        with QUIET():
            self.bindings[position].parameter.data = memory

    def point_back(self, position: int) -> None:
        """End what `point` began."""
        binding = self.bindings[position]
        self.point(position, binding.poison if self.is_poisoned else binding.view)

    def edited(self) -> list[int]:
        """Positions whose parameters were changed in place since they were accepted, other than through ``p.data``."""
        with QUIET():
            versions = [version_of(binding.parameter) for binding in self.bindings]
        if versions == self._versions:
            return []
        return [i for i, (new, old) in enumerate(zip(versions, self._versions, strict=True)) if new != old]

    def accept(self, position: int) -> None:
        """Mark home and parameter as equal."""
        with QUIET():
            self._versions[position] = version_of(self.bindings[position].parameter)

    def take_assigned(self) -> list[tuple[int, Tensor]]:
        """Positions and values of parameters whose ``data`` the user has set to another tensor.

        They point again at what the chunk says; bringing the values there is the caller's.
        """
        found = []
        with without_torch_function():  # the class while it is away and the observer: this is no use
            for position, binding in enumerate(self.bindings):
                ours, former = binding.poison, binding.view
                if not self.is_poisoned:
                    ours, former = former, ours
                if not binding.parameter.is_set_to(ours):
                    if not binding.parameter.is_set_to(former):  # else an interrupt came between
                        found.append((position, binding.parameter.data))
                    binding.parameter.data = ours
        return found

    def supersede(self, positions: Iterable[int]) -> None:
        """Say that an update gives these parameters other values: autograd then refuses graphs that need the old ones.

        As after any in-place operation, and as after ``torch.optim``'s steps: of those graphs, the nodes that have
        saved the parameter raise, the others run.
        """
        for position in positions:
            with QUIET():
                torch.autograd.graph.increment_version(self.bindings[position].parameter)
            self.accept(position)

    def settle(self) -> None:
        """Wait for the pending update of this chunk, and show the full copy again if there is one.

        Raises what went wrong in the update (again at each call).
        """
        if self.update is not None:
            self.update.wait()
            self.update = None
            if self.is_poisoned and self.state in (ChunkState.READY, ChunkState.IN_USE):
                self._expose()

    def bind(self, position: int, parameter: Tensor) -> None:
        """Make ``parameter`` follow this chunk from now on."""
        view = self.views[position]
        nan = torch.full((), float("nan"), dtype=view.dtype, device=view.device)
        plain = plain_class(type(parameter))
        away = away_class(plain) if is_linked(parameter) else plain
        binding = Binding(parameter, view, nan.expand(view.shape), plain, away)
        self.bindings.append(binding)
        with QUIET():
            self._versions.append(version_of(parameter))
            parameter.data = binding.poison if self.is_poisoned else view
        parameter.__class__ = binding.plain if self.pins else binding.away

    def entrust(self, keeper: Keeper) -> None:
        """Have ``keeper`` answer for the chunk's parameters while nothing has it pinned."""
        for position, binding in enumerate(self.bindings):
            link(binding.parameter, keeper, partial(self.last_value, position))
            self.bindings[position] = entrusted = replace(binding, away=away_class(binding.plain))
            binding.parameter.__class__ = entrusted.plain if self.pins else entrusted.away

    def last_value(self, position: int) -> Tensor:
        """The values of a parameter whose model is gone, in memory of its own.

        Raises
        ------
        RuntimeError
            If they were on disk.
        """
        self.settle()
        slot, view = self.layout.slots[position], self.views[position]
        if self.state is ChunkState.READY:
            return view.clone(memory_format=torch.preserve_format)
        source = self.source.tensor
        if not self.is_whole:
            raise RuntimeError(
                f"{slot.name} was in the chunks of a boosted model that is gone, and other processes had parts of it: "
                "keep the model for as long as its parameters are used, or keep p.detach().clone()"
            )
        if source is None:
            raise RuntimeError(
                f"{slot.name} was on disk in the chunks of a boosted model that is gone, and its values with it: keep "
                "the model for as long as its parameters are used, or keep p.detach().clone()"
            )
        home = source.as_strided(slot.shape, slot.stride, source.storage_offset() + slot.offset)
        return home.to(view.device, view.dtype, copy=True, memory_format=torch.preserve_format)

    def release(self) -> None:
        """Let the parameters go: those that others keep know where their values are."""
        self.bindings.clear()

    def become(self, other: "Chunk") -> None:
        """Have the homes, the full copy and the state of a chunk with the same slots; the parameters follow.

        A full copy that is no home, before and after, keeps its storage: graphs that are still to run may need it.
        """
        parameters = [binding.parameter for binding in self.bindings]
        kept = (
            {}
            if self.full_is_home or other.full_is_home
            else {"full": self.full, "views": self.views, "own_full": self.own_full}
        )
        vars(self).update({**vars(other), **kept})
        for position, parameter in enumerate(parameters):
            self.bind(position, parameter)

    def _move_to(self, state: ChunkState) -> None:
        self.state = transition(self.index, self.state, state)
