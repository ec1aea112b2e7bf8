"""From parameters to a placed set of chunks: the decisions of `boost`, before anything is changed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..chunk import (
    FETCH_WORKERS,
    STORE_BLOCKS,
    BufferSpec,
    ChunkLayout,
    ChunkPlan,
    ChunkSearch,
    TensorSpec,
    Tier,
    pack,
    search_chunk_numel,
)
from ..chunk.layout import ALIGN_NUMEL, align, size_class
from ..chunk.search import RING_CHUNKS, bounds, waste_ratio
from ..config import GeminiConfig
from ..memory.capacity import Capacities
from ..nn.optimizer.adam_rule import ADAM
from ..planning.gradient_room import gradient_room
from ..planning.placement import AutoPlacementPolicy, DoesNotFit, Placement, Room, on_tier, place
from ..units.units import nested_chunks
from ..updates.update_pipeline import BLOCK_SETS, buffer_count
from .homes import Group, chunk_need, full_is_home, planned
from .remedy import TooSmall, out_of_memory, remedy

SlotsOf = Callable[[Mapping[str, Any]], tuple[BufferSpec, ...]]
"""As `Rule.slots`."""
MANAGED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_BLOCK_NUMEL = 4096
LARGEST_BLOCK_NUMEL = 1 << 20
"""4 MiB in fp32: past the latency of any disk, and three blocks of four roles are still only 48 MiB."""
STAGING_SHARE = 8
"""Staging takes at most one part in so many of the HOST capacity."""
SHRINKINGS = 4
"""Chunk sizes to try, each half of the one before: a unit may need several chunks, or one beside a huge tensor."""


@dataclass(frozen=True, slots=True)
class Packing:
    """The decision."""

    parameters: tuple[nn.Parameter, ...]
    """The managed ones; a slot's ``key`` is an index into these."""
    plans: tuple[ChunkPlan, ...]
    search: ChunkSearch
    placement: Placement
    staging_block_numel: int
    """0 where nothing is on DISK."""
    updated_buffer_count: int
    """Most buffers that the update of a chunk reads: blocks of as many are staged for one that is on DISK."""
    full_copies_limit_bytes: int | None
    """What full copies may take on DEVICE, where the policy says less than what is free."""
    together_bytes: int
    """Full copies that units beside each other may have in use at once. With less room a step may run out of it."""

    @property
    def staging_bytes(self) -> int:
        """What the blocks between DISK and everything else take on HOST."""
        return staging_bytes(self.staging_block_numel, self.updated_buffer_count)

    def with_plans(self, plans: Sequence[ChunkPlan]) -> "Packing":
        """The same with other plans for some chunks."""
        other = {plan.layout.index: plan for plan in plans}
        nbytes = dict(self.placement.nbytes)
        for index, plan in other.items():
            for sign, of in ((-1, self.plans[index]), (1, plan)):
                for name, tier in of.tiers.items():
                    nbytes[tier] += sign * on_tier(of.nbytes(name), tier)
        new = tuple(other.get(plan.layout.index, plan) for plan in self.plans)
        placement = replace(self.placement, homes=tuple(plan.tiers for plan in new), nbytes=nbytes)
        return replace(self, plans=new, placement=placement)


def managed_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that chunks can hold, each once, by name: dense floating-point ones of up to 32 bits."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dtype in MANAGED_DTYPES and parameter.layout is torch.strided
    }


def decide(
    model: nn.Module,
    param_groups: Sequence[Mapping[str, Any]],
    config: GeminiConfig,
    capacities: Capacities,
    slots_of: SlotsOf = ADAM.slots,
) -> Packing:
    """Choose the chunk size, pack, and place. Changes nothing.

    Parameters
    ----------
    param_groups
        Of the optimizer; empty without one (nothing is trainable then).
    slots_of
        From a group to what the optimizer keeps for each element of its parameters.

    Raises
    ------
    OutOfMemory
        If the tiers together are too small, or DEVICE is too small for one unit. The message says what to change.
    """
    named = managed_parameters(model)
    specs = _specs(model, named, param_groups, [slots_of(group) for group in param_groups])
    attempt = partial(_decide, model, specs, tuple(named.values()), config)
    try:
        return attempt(capacities)
    except TooSmall as error:
        remedies = [remedy(tier, error, attempt, capacities) for tier in (Tier.DISK, Tier.HOST)]
        failure = out_of_memory(error, [enough for enough in remedies if enough is not None], capacities)
    raise failure


def _specs(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    param_groups: Sequence[Mapping[str, Any]],
    slots: Sequence[tuple[BufferSpec, ...]],
) -> list[TensorSpec]:
    group_of = {id(p): i for i, group in enumerate(param_groups) for p in group["params"]}
    with_statistics = {
        id(p)
        for m in model.modules()
        if getattr(m, "running_mean", None) is not None
        for p in m.parameters(recurse=False)
    }
    specs = []
    for name, parameter in named.items():
        index = group_of.get(id(parameter), -1)
        trainable = parameter.requires_grad and index >= 0
        keeps_fp32 = id(parameter) in with_statistics
        group = Group(index, True, keeps_fp32, slots[index]) if trainable else Group(-1, False, keeps_fp32)
        # States that a block of elements shares begin with a parameter, so that they do not depend on what is around.
        multiple = max((slot.block_numel for slot in group.states), default=1)
        stride = _dense_stride(parameter)
        specs.append(TensorSpec(name, tuple(parameter.shape), stride, group, align(ALIGN_NUMEL, multiple)))
    return specs


def _decide(
    model: nn.Module,
    specs: Sequence[TensorSpec],
    parameters: tuple[nn.Parameter, ...],
    config: GeminiConfig,
    capacities: Capacities,
) -> Packing:
    searches = _chunk_sizes(specs, config, capacities)
    for search in searches[:-1]:
        try:
            return _decide_with(search, model, specs, parameters, config, capacities)
        except TooSmall:  # smaller chunks make a smaller ring
            continue
    return _decide_with(searches[-1], model, specs, parameters, config, capacities)


def _decide_with(
    search: ChunkSearch,
    model: nn.Module,
    specs: Sequence[TensorSpec],
    parameters: tuple[nn.Parameter, ...],
    config: GeminiConfig,
    capacities: Capacities,
) -> Packing:
    layouts = pack(specs, search.numel)
    use = _use(model, layouts, parameters)
    buffers = max((buffer_count(layout.group.states) for layout in layouts), default=0)
    block = _staging_block(layouts, capacities, buffers)
    placement = _place(layouts, use, config, capacities, staging_bytes(block, buffers))
    plans = tuple(
        planned(layout, homes, config, capacities.unified)
        for layout, homes in zip(layouts, placement.homes, strict=True)
    )
    copies = _copies(layouts, config, capacities, placement)
    return Packing(
        parameters, plans, search, placement,
        staging_block_numel=block if placement.uses_disk else 0,
        updated_buffer_count=buffers,
        full_copies_limit_bytes=_full_copies_limit(copies, use, config, capacities),
        together_bytes=_largest((*use.units, *use.siblings), copies)[1],
    )  # fmt: skip


def _dense_stride(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's own strides where they are a permutation of contiguous ones (channels_last), else contiguous."""
    expected = 1
    for size, stride in sorted(zip(parameter.shape, parameter.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if size != 1 and stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return tuple(parameter.stride())


def _chunk_sizes(specs: Sequence[TensorSpec], config: GeminiConfig, capacities: Capacities) -> Sequence[ChunkSearch]:
    """What to try, in this order: the size with the least waste, then smaller ones."""
    sizes, groups = [spec.numel for spec in specs], [spec.group for spec in specs]
    if config.chunk_numel is not None:
        return [ChunkSearch(config.chunk_numel, waste_ratio(sizes, config.chunk_numel, groups))]
    if config.search_range is not None:
        return [search_chunk_numel(sizes, *config.search_range, config.search_step, groups)]
    room = capacities.nbytes[Tier.DEVICE] // config.compute_dtype.itemsize
    if capacities.unified:
        room //= 4  # most of this RAM is for homes
    found = []
    for _ in range(SHRINKINGS):
        low, high = bounds(sizes, room)
        found.append(search_chunk_numel(sizes, low, high, config.search_step, groups))
        room = min(room // 2, RING_CHUNKS * high // 2)
    return found


@dataclass(frozen=True, slots=True)
class _Use:
    """Which chunks are needed at once, as far as the modules tell before anything has run."""

    units: Sequence[tuple[str, frozenset[int]]]
    """The chunks in use while a unit runs, with its name."""
    siblings: Sequence[tuple[str, frozenset[int]]]
    """The same, with the units beside it in its module. Those that read the same input (query, key and value) stay in
    use in backward until the last of them is done; which these are is not known yet."""
    stages: Sequence[frozenset[int]]
    """The chunks that each module uses by itself, in the order of the modules, which is mostly that of their use."""


def _use(model: nn.Module, layouts: Sequence[ChunkLayout], parameters: Sequence[nn.Parameter]) -> _Use:
    chunk_of = {id(parameters[slot.key]): layout.index for layout in layouts for slot in layout.slots}
    owned = {
        module: frozenset(chunk_of[id(p)] for p in module.parameters(recurse=False) if id(p) in chunk_of)
        for module in model.modules()
    }
    units = nested_chunks(model, chunk_of)
    of_name = dict(units)
    siblings, stages = [], []
    for name, module in model.named_modules():
        stages.append(owned[module])
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue  # their members run one after the other, or who knows
        children = list(module.children())
        if not any(list(child.children()) for child in children):  # query, key and value, say
            stages.append(frozenset().union(*(owned[child] for child in children)))
        members = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        siblings.append((name, frozenset().union(*(of_name.get(member, frozenset()) for member in members))))
    return _Use(units, siblings, stages)


def _staging_block(layouts: Sequence[ChunkLayout], capacities: Capacities, buffers: int) -> int:
    largest = max((layout.numel for layout in layouts), default=0)
    affordable = capacities.nbytes[Tier.HOST] // STAGING_SHARE // staging_bytes(1, buffers)
    return max(min(largest, affordable, LARGEST_BLOCK_NUMEL) // 2048 * 2048, SMALLEST_BLOCK_NUMEL)


def staging_bytes(block_numel: int, buffers: int) -> int:
    return (FETCH_WORKERS + STORE_BLOCKS + BLOCK_SETS * buffers) * block_numel * 4


def _place(
    layouts: Sequence[ChunkLayout],
    use: _Use,
    config: GeminiConfig,
    capacities: Capacities,
    staging_bytes: int,
) -> Placement:
    """Place homes; with ``update_in_backward`` gradients have none, unless there is not even RAM for a few of them."""
    arguments = (layouts, use, config, capacities, staging_bytes)
    if not (config.update_in_backward and capacities.nbytes[Tier.DISK]):
        return _place_around_ring(*arguments, borrow=config.update_in_backward)
    try:
        return _place_around_ring(*arguments, borrow=True)
    except TooSmall:
        return _place_around_ring(*arguments, borrow=False)


def _place_around_ring(
    layouts: Sequence[ChunkLayout],
    use: _Use,
    config: GeminiConfig,
    capacities: Capacities,
    staging_bytes: int,
    borrow: bool,
) -> Placement:
    """Place homes around a ring for full copies, as large as prefetching likes, or as small as the units allow."""
    needs = [chunk_need(layout, config, borrow) for layout in layouts]
    gradients = {
        layout.index: layout.numel * layout.group.dtype(config).itemsize
        for layout, need in zip(layouts, needs, strict=True)
        if need.borrows_gradient
    }
    gradient_bytes = gradient_room(use.stages, gradients)
    if config.communicator.owner.count > 1:  # they are summed when backward is over
        gradient_bytes = sum(map(size_class, gradients.values()))
    streamed = _copies(layouts, config, capacities, None)
    ahead = max(streamed, default=0)

    def attempt(ring_bytes: int) -> Placement:
        room = Room(
            capacities=capacities.nbytes,
            unified=capacities.unified,
            ring_bytes=ring_bytes,
            staging_bytes=staging_bytes,
            gradient_bytes=gradient_bytes,
        )
        return place(needs, room, config.policy)

    name, least = _largest(use.units, streamed)
    _, likely = _largest(use.siblings, streamed)
    sizes = {
        min(in_use + depth * ahead, sum(streamed))
        for in_use in (max(least, likely), least)
        for depth in (config.max_prefetch, 1, 0)
    }
    # A ring of nothing may do: where each home is the full copy, nothing streams.
    for ring_bytes in (0, *sorted(sizes, reverse=True)):
        try:
            placement = attempt(ring_bytes)
        except DoesNotFit as error:
            fault = error
            continue
        if _largest(use.units, _copies(layouts, config, capacities, placement))[1] <= ring_bytes:
            return placement
    raise TooSmall(sum(sum(need.buffers.values()) for need in needs), name, least, fault)


def _copies(
    layouts: Sequence[ChunkLayout], config: GeminiConfig, capacities: Capacities, placement: Placement | None
) -> list[int]:
    """Bytes of each chunk's full copy beside its home; before placement, of all that could have one."""
    return [
        0
        if placement is not None and full_is_home(layout, placement.homes[i], config, capacities.unified)
        else layout.numel * layout.group.dtype(config).itemsize
        for i, layout in enumerate(layouts)
    ]


def _largest(sets: Sequence[tuple[str, frozenset[int]]], copies: Sequence[int]) -> tuple[str, int]:
    """The set that needs most room for full copies at once, and how much."""
    return max(((name, sum(copies[i] for i in chunks)) for name, chunks in sets), key=lambda u: u[1], default=("", 0))


def _full_copies_limit(copies: Sequence[int], use: _Use, config: GeminiConfig, capacities: Capacities) -> int | None:
    if isinstance(config.policy, AutoPlacementPolicy) or capacities.unified:
        return None
    wanted = round((1.0 - config.policy.offload_param_frac) * sum(copies))
    return max(wanted, _largest(use.units, copies)[1], _largest(use.siblings, copies)[1])
