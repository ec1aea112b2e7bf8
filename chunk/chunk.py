"""One chunk: its homes, its full copy on DEVICE, and the parameters bound to it."""

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gemini.torch_private import storage_key

from .bindings import Bindings
from .buffer import Buffer
from .content import BufferSpec
from .extent import Place
from .homes import Homes
from .loan import Loan
from .memory import Transfer
from .names import MASTER
from .plan import ChunkPlan
from .shared_gradient import Gradient
from .state import RESIDENT, SETTLED, TRANSITIONS, UPDATING, VALID, ChunkState, transition
from .stored import Decoded
from .tier import Tier


class Chunk:
    """A chunk's memory and state. It decides nothing: `ChunkManager` and the engine do.

    ``full`` is one storage, resized 0 <-> n and never replaced: autograd may have saved views of it. Where home and
    full copy would be the same bytes (same dtype, same memory), they are: ``full_is_home``, and nothing moves.
    """

    def __init__(self, plan: ChunkPlan, homes: dict[str, Buffer], full: Tensor, gradient: Gradient | None) -> None:
        self.plan = plan
        self.layout = layout = plan.layout
        self.codecs = plan.codecs
        self.homes = Homes(homes)
        """Where each buffer of the plan is, but for the gradient's."""
        self.full = full
        with torch.no_grad():
            # Made now and kept: a view of a storage that is 0 bytes long cannot be made, but it can be held.
            self.views = tuple(
                full.as_strided(slot.shape, slot.stride, full.storage_offset() + slot.offset) for slot in layout.slots
            )
            self.own_full = full.narrow(0, plan.extent.start, len(plan.extent))
            """The part of the full copy that is at home here."""
        self.gradient = gradient
        self.bindings = Bindings(is_hidden=not plan.full_is_home, are_copies=not plan.full_is_home)
        self.state = ChunkState.HOME
        self.pins = 0
        self.loan: Loan | None = None
        """The full copy's memory, if some has been lent since home was last known to have the same values."""
        self._transfer: Transfer | None = None
        """The move of a chunk that is FETCHING."""
        self._update: Transfer | None = None
        """The update of a chunk that is UPDATING in one form or another, or that a chunk is FETCHING behind."""

    @property
    def index(self) -> int:
        return self.layout.index

    @property
    def states(self) -> tuple[BufferSpec, ...]:
        """What the optimizer keeps here, in its own order."""
        return self.plan.states

    @property
    def full_is_home(self) -> bool:
        """True if the full copy is the home that it would be fetched from."""
        return self.plan.full_is_home

    @property
    def is_trainable(self) -> bool:
        """True if an optimizer updates it."""
        return self.gradient is not None

    @property
    def rounds(self) -> bool:
        """True if what is written to its masters does not come back as it was."""
        return self.plan.codec.rounds

    @property
    def is_split(self) -> bool:
        """True if its full copy is a part of its masters: the upper halves. See [Note: Split master]."""
        return self.full_is_home and self.plan.codec.dtype is not self.full.dtype

    @property
    def tier(self) -> Tier:
        """Where its masters are."""
        return self.homes[MASTER].tier

    def place(self, position: int, name: str) -> Place:
        """Where the masters or a state of a parameter are."""
        return self.plan.place(position, self.codecs[name].block_numel)

    @property
    def specs(self) -> Mapping[str, BufferSpec]:
        """Its buffers that have a home, by their names."""
        return self.plan.specs

    @property
    def extent(self) -> range:
        """The elements of the layout that are at home here."""
        return self.plan.extent

    @property
    def is_whole(self) -> bool:
        """True if all of it is at home here, as without other owners."""
        return len(self.extent) == self.layout.numel

    @property
    def is_shared(self) -> bool:
        """True if there are other owners, also where none of this chunk is at home with them."""
        return self.plan.owner.count > 1

    @property
    def source(self) -> Buffer:
        """What a fetch reads."""
        codec = self.plan.codec
        return Decoded(self.homes, self.specs, codec) if codec.source is None else self.homes[codec.source]

    @property
    def full_nbytes(self) -> int:
        """Bytes that the full copy takes on DEVICE beside the homes."""
        return 0 if self.plan.full_is_home else self.full.nbytes

    # -- loans

    @property
    def is_lent(self) -> bool:
        """True if code outside of the manager holds a part of the full copy. See [Note: Loans]."""
        return self.loan is not None and self.loan.is_alive()

    def lend(self) -> Loan:
        """The loan of the full copy's memory; the chunk must be on DEVICE."""
        assert self.is_valid
        if self.loan is None:
            self.loan = Loan(self.views, remembers=self.is_split or self.is_shared)
        return self.loan

    def end_loan(self) -> None:
        """Forget what was lent, unless somebody holds it still."""
        if not self.is_lent:
            self.loan = None

    def has_memory(self, tensor: Tensor) -> bool:
        """True if a tensor lies in the full copy, or in what was lent of it."""
        is_in_full = storage_key(tensor.untyped_storage()) == storage_key(self.full.untyped_storage())
        return is_in_full or (self.loan is not None and self.loan.has(tensor))

    def accept(self, position: int) -> None:
        """Mark home and parameter as equal."""
        self.bindings.accept(position)
        if self.loan is not None:
            self.loan.remember(position)

    # -- states

    @property
    def is_resident(self) -> bool:
        """True if the full copy exists or is arriving."""
        return self.state in RESIDENT

    @property
    def is_valid(self) -> bool:
        """True if the full copy has the values of home, and no update is changing them."""
        return self.state in VALID

    @property
    def is_idle(self) -> bool:
        """True if the full copy exists and nothing uses it."""
        return self.state is ChunkState.READY or self.state is ChunkState.READY_UPDATING

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
            self.settle()  # the update that the move has waited for
        except BaseException as error:
            # Another signal's handler may raise in this thread: the move then goes on, and must keep its memory.
            if isinstance(error, Exception) or transfer.done():
                self._move_to(ChunkState.HOME if self._update is None else ChunkState.HOME_UPDATING)
                self._transfer = None
            raise
        self._move_to(ChunkState.READY)
        self._transfer = None

    @property
    def has_arrived(self) -> bool:
        """True if `finish_fetch` would not wait."""
        return self._transfer is None or self._transfer.done()

    @property
    def update(self) -> Transfer | None:
        """The update under way, for what has to come behind it."""
        return self._update

    def begin_update(self, update: Transfer, positions: Iterable[int], fills_full: bool = False) -> None:
        """An update of the parameters at these positions is under way; it may fill the full copy of a chunk at HOME.

        Nobody finds the old values from here on, but in a chunk that is in use: its update is to be settled at once.
        """
        is_again, self._update = self._update is update, update
        if not (is_again and self.state in SETTLED):  # else a step that had to be completed again has done this before
            self._move_to(ChunkState.READY_UPDATING if fills_full else UPDATING.get(self.state, self.state))
        self.bindings.bump_versions(positions)
        if not self.pins:
            self.bindings.hide()

    def settle(self) -> None:
        """Wait for the update under way, if there is one, and show the full copy again if there is one.

        Raises what went wrong in the update (again at each call).
        """
        if self._update is not None:
            self._update.wait()
            if self.state in SETTLED:  # it is not after an interrupt of this method
                self._move_to(SETTLED[self.state])
            if self.is_valid:
                self.bindings.expose()
            self._update = None

    def rest(self, deadline: float) -> None:
        """Return when no other thread writes into its memory, by an update or by a move, or at the deadline.

        ``deadline`` is of `time.monotonic`.
        """
        for work in (self._update, self._transfer):
            if work is not None:
                work.rest(max(0.0, deadline - time.monotonic()))

    def pin(self) -> None:
        """READY or IN_USE -> IN_USE; parameters are readable until the last `unpin`."""
        if self._update is not None:
            self.settle()
        if self.pins == 0:
            if self.state is not ChunkState.IN_USE:  # it is after an interrupt of `pin` or `unpin`
                self._move_to(ChunkState.IN_USE)
            self.bindings.be_pinned()
        self.pins += 1
        if self.bindings.is_hidden:
            self.bindings.expose()

    def unpin(self) -> None:
        """One pin less; without any the full copy is READY (or READY_UPDATING, where an update has failed)."""
        assert self.pins > 0, f"chunk {self.index} is not pinned"
        self.pins -= 1
        if self.pins == 0:
            self._become_unused()
            self.bindings.be_away()

    def mend(self, pins: int) -> None:
        """Set the number of pins to those that visits hold, and the parameters to what the state says.

        An interrupt may have come between.
        """
        if not self.is_resident:
            self.bindings.hide()
        is_in_use = self.state in (ChunkState.IN_USE, ChunkState.IN_USE_UPDATING)
        if self.pins == pins and is_in_use == (pins > 0):
            return
        self.pins = pins
        if pins:
            self.bindings.be_pinned()
        else:
            if is_in_use:
                self._become_unused()
            self.bindings.be_away()

    def _become_unused(self) -> None:
        if self.state is ChunkState.IN_USE:
            self._move_to(ChunkState.READY)
        else:
            self._move_to(ChunkState.READY_UPDATING)
            self.bindings.hide()

    def evict(self) -> None:
        """READY -> HOME. Copies nothing: the full copy is clean, or the manager has kept what was changed in it."""
        assert not self.is_lent
        self.loan = None
        self._move_to(ChunkState.HOME)
        self.bindings.hide()

    def _move_to(self, state: ChunkState) -> None:
        is_allowed = state in TRANSITIONS[self.state]  # looked at here, since `transition` is a call more
        self.state = state if is_allowed else transition(self.layout.index, self.state, state)

    # -- parameters

    def bind(self, position: int, parameter: Tensor) -> None:
        """Make ``parameter`` follow this chunk from now on."""
        self.bindings.add(parameter, self.views[position], is_pinned=self.pins > 0)

    def replan(self, plan: ChunkPlan, added: Mapping[str, Buffer]) -> list[Buffer]:
        """Have the homes of this plan, which keeps the masters; ``added`` are new. Returns those that it has not."""
        self.plan, self.codecs = plan, plan.codecs
        self.homes.update(added)
        return [self.homes.pop(name) for name in self.homes.keys() - plan.specs.keys()]

    def rehome(self, built: "Chunk") -> None:
        """Have the homes and the full copy of a chunk that was prepared for this; the parameters follow.

        Both are at rest. A full copy that is no home, before and after, stays: graphs that are to run may need it.
        """
        if self.full_is_home or built.full_is_home:
            self.full, self.views, self.own_full = built.full, built.views, built.own_full
        self.plan, self.codecs = built.plan, built.codecs
        self.homes, self.gradient, self.state, self.loan = built.homes, built.gradient, built.state, None
        self.bindings = built.bindings
        self.bindings.follow(is_pinned=self.pins > 0)
