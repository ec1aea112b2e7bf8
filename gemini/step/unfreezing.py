"""Giving a boosted optimizer parameters that were frozen when the model was boosted."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..chunk import MASTER, BufferSpec, Chunk, ChunkPlan, Tier, write_slot
from ..config import GeminiConfig
from ..engine import Engine
from ..errors import OutOfMemory
from ..nn.optimizer.managed import ManagedOptimizer
from ..nn.optimizer.rules.rule import Rule
from ..packing.group import Group, plans
from ..packing.packing import Packing
from ..planning.placement import AutoPlacementPolicy, Capacity, Placement, on_tier, place
from ..runtime.arrivals import watch_gradients
from ..sizes import format_bytes
from ..updates.update_pipeline import PAGE_NUMEL, buffer_count
from .kept_states import KeptStates

_NAMES_SHOWN = 4
_WAY_OUT = (
    "To have room from the start let them require gradients and be in a group before booster.boost, freeze them after "
    "it, and unfreeze them when it is time; or save the model, and boost a new one that loads it"
)


class Unfreezing:
    """Makes room in chunks for what an optimizer keeps of parameters, and has them updated.

    Parameters
    ----------
    engine
        Plans the moves of the chunks, and takes their gradients.
    config
        What the model was boosted with.
    """

    def __init__(self, engine: Engine, config: GeminiConfig) -> None:
        self._manager = engine.manager
        self._engine = engine
        self._config = config

    @property
    def _is_shared(self) -> bool:
        return not self._manager.together.communicator.owner.is_alone

    @property
    def packing(self) -> Packing:
        """The plans of the chunks, as they are now."""
        return self._engine.memory.packing

    def adopt(self, plans: Sequence[ChunkPlan]) -> None:
        """Some chunks have other homes now."""
        self._engine.memory.adopt(self.packing.with_plans(plans))

    def admit_all(self, optimizer: ManagedOptimizer, kept: KeptStates) -> None:
        """Admit parameters that were frozen when the model was boosted, are in a group, and have got a gradient."""
        follows, find = self._engine.updates.gradients.follows, self._manager.find
        for index, group in enumerate(optimizer.param_groups):
            strangers = [p for p in group["params"] if find(p) is not None and not follows(p)]
            # Several ranks admit the same parameters, whatever their batches use.
            unfrozen = [p for p in strangers if p.grad is not None or (self._is_shared and p.requires_grad)]
            if unfrozen:
                self.admit(optimizer, index, unfrozen, kept)
                self._engine.updates.contribute(unfrozen)

    def admit(self, optimizer: ManagedOptimizer, index: int, parameters: Iterable[Tensor], kept: KeptStates) -> None:
        """Update these parameters of the optimizer's group ``index`` from now on, with the states that they have."""
        frozen = [p for p in parameters if self._manager.find(p) is not None and not kept.keeps(p)]
        # From before they were frozen, say, or loaded since.
        states = [(p, optimizer.exported_state(p)) for p in frozen if p in optimizer.outside]
        self.make_room(optimizer, index, parameters)
        for parameter, state in states:
            del optimizer.outside[parameter]
            kept.replace(parameter, state)

    def make_room(self, optimizer: ManagedOptimizer, index: int, parameters: Iterable[Tensor]) -> None:
        """Have room for what the optimizer keeps of these parameters of its group ``index``. All or nothing.

        Raises
        ------
        OutOfMemory
            If there is no room for their gradients and states.
        ValueError
            If their chunks cannot keep such states, or they are in use.
        """
        places = {p: place for p in parameters if (place := self._manager.find(p)) is not None}
        if not places:
            return
        group = optimizer.param_groups[index]
        index = next(i for i, each in enumerate(optimizer.whole.param_groups) if each is group)
        rule = optimizer.rules.of_group(group)
        slots = rule.slots(group)
        chunks = {chunk.index: chunk for chunk, _ in places.values()}
        for chunk, position in places.values():
            name = chunk.layout.slots[position].name
            if chunk.is_trainable and chunk.states != slots:
                raise ValueError(
                    f"{name} shares a chunk with parameters for which the optimizer keeps "
                    f"{_listed(chunk.states)}, and with the options of group {index} it keeps "
                    f"{_listed(slots)}. {_WAY_OUT}"
                )
            if chunk.rounds:
                raise ValueError(
                    f"{name} is kept in fewer bits (quantize=...) and cannot be trained. Train adapters beside it, or "
                    "boost with quantize=gemini.Quantization(format, skip=(module, ...)), which leaves modules as they "
                    "are, or without quantize"
                )
            if chunk.pins:
                raise ValueError(f"{name} is in use: unfreeze it between steps")
        frozen = [chunks[i] for i in sorted(chunks) if not chunks[i].is_trainable]
        if frozen and any(chunk.plan.averages for chunk in self._manager.chunks):
            names = ", ".join(chunk.layout.slots[0].name for chunk in frozen[:_NAMES_SHOWN])
            raise ValueError(
                f"the model has a running average, which would not follow what is unfrozen now (chunks with {names}): "
                "call ema.close() first, and begin another average afterwards; or unfreeze before"
            )
        rebuilt = self._plans(frozen, slots, index) if frozen else ()
        self._manager.rebuild(rebuilt, partial(fill_states, rule) if rule.has_initial_state else None)
        admitted = list(places)
        with _requiring_gradients(admitted):
            watch_gradients(self._engine, admitted)
        if rebuilt:
            self.adopt(rebuilt)

    def _plans(self, chunks: Sequence[Chunk], slots: tuple[BufferSpec, ...], index: int) -> tuple[ChunkPlan, ...]:
        """Plans for the same parameters at the same places, with masters, gradients and states.

        A chunk is unfrozen as a whole: that keeps the place of every parameter, and parameters that stay frozen beside
        those that do not take room for nothing, up to a chunk at either end of what is unfrozen.
        """
        layouts, config = [chunk.layout for chunk in chunks], self._config
        in_chunks = [slot for layout in layouts for slot in layout.slots]
        multiple = max((slot.block_numel for slot in slots), default=1)
        for slot in in_chunks:
            if slot.offset % multiple:
                raise ValueError(
                    f"{slot.name} was packed without room for blocks of {multiple} elements, which these states need. "
                    f"{_WAY_OUT}"
                )
        dtypes = [chunk.full.dtype for chunk in chunks]
        groups = [Group.of(config, index, dtype, slots, keeps_fp32=dtype is torch.float32) for dtype in dtypes]
        pairs = zip(layouts, groups, strict=True)
        needs = [group.need(layout.numel, config.update_in_backward) for layout, group in pairs]
        memory, on_disk = self._manager.ledger.memory, [chunk for chunk in chunks if chunk.tier is Tier.DISK]
        found = place(needs, self._capacity(chunks, slots), AutoPlacementPolicy())
        if isinstance(found, Placement):
            return plans(layouts, groups, found, memory)
        # Masters that stay where they are on a full disk take no room; which of them stay is known when all are placed.
        again = place(needs, self._capacity(chunks, slots, _disk_bytes(on_disk)), AutoPlacementPolicy())
        if isinstance(again, Placement):
            others = plans(layouts, groups, again, memory)
            at = {plan.layout.index: plan for plan in others}
            staying = [chunk for chunk in on_disk if at[chunk.index].keeps_masters_of(chunk.plan)]
            if again.nbytes[Tier.DISK] - _disk_bytes(staying) <= self._manager.ledger.free(Tier.DISK):
                return others
        more = f" and {len(in_chunks) - _NAMES_SHOWN} more" if len(in_chunks) > _NAMES_SHOWN else ""
        raise OutOfMemory(
            f"host tier out of memory. To unfreeze chunks with "
            f"{', '.join(slot.name for slot in in_chunks[:_NAMES_SHOWN])}{more}, {format_bytes(found.missing_bytes)} "
            f"are missing for their masters, gradients and states; nothing has been changed. {_WAY_OUT}"
        )

    def _capacity(self, chunks: Sequence[Chunk], slots: tuple[BufferSpec, ...], more_on_disk: int = 0) -> Capacity:
        """What is left for homes; full copies that share a pool with them can be evicted, but for one moment's."""
        manager, ledger = self._manager, self._manager.ledger
        copies = {chunk.index: chunk.full.numel() * chunk.full.element_size() for chunk in chunks}
        is_shared = ledger.memory.shares(Tier.HOST, Tier.DEVICE)
        resident = manager.full_copies.nbytes if is_shared else 0
        can_stage = manager.disk is not None and buffer_count(slots) <= self.packing.updated_buffer_count
        if whole := self.packing.whole_numel:
            can_stage = can_stage and all(slot.numel + PAGE_NUMEL <= whole for c in chunks for slot in c.layout.slots)
        on_disk = ledger.free(Tier.DISK) + more_on_disk if can_stage else 0
        return Capacity(
            nbytes={Tier.DEVICE: 0, Tier.HOST: ledger.free(Tier.HOST) + resident, Tier.DISK: on_disk},
            memory=ledger.memory,
            ring_bytes=self._engine.pacing.least_bytes(copies) if is_shared else 0,
        )


def fill_states(rule: Rule, chunk: Chunk) -> None:
    """Make the states of all parameters of a chunk what they are before the first step."""
    for slot in chunk.states:
        for position in range(len(chunk.layout.slots)):
            write_slot(
                chunk, position, slot.name, torch.full((), rule.initial(slot.name), dtype=torch.float32, device="cpu")
            )


def _disk_bytes(chunks: Iterable[Chunk]) -> int:
    """Bytes on DISK of the masters of chunks that have them there."""
    masters = [part for chunk in chunks for part in chunk.homes[MASTER].parts]
    return sum(on_tier(part.nbytes, Tier.DISK) for part in masters if part.tier is Tier.DISK)


def _listed(slots: Any) -> str:
    return ", ".join(f"{slot.name} in {slot.dtype}" for slot in slots) or "nothing"


@contextmanager
def _requiring_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks can be put on those alone; they stay when it is over."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
