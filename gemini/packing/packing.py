"""From a model to a placed set of chunks: the decisions of `boost`, before anything is changed."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ..chunk import FETCH_WORKERS, STORE_BLOCKS, BufferSpec, ChunkPlan, MemoryMap, TensorSpec, Tier
from ..chunk.layout import align
from ..config import GeminiConfig
from ..memory.capacity import Capacities
from ..nn.optimizer.rules.adam_rule import ADAM
from ..planning.placement import Capacity, on_tier
from ..units.units import nested_parameters
from ..updates.update_pipeline import BLOCK_SETS, PAGE_NUMEL, buffer_count
from .group import Group, plans
from .problem import Problem, Use
from .quantised import quantised_parameters
from .remedy import out_of_memory
from .solve import Shortfall, Solution, solve

SlotsOf = Callable[[Mapping[str, Any]], tuple[BufferSpec, ...]]
"""As `Rule.slots`."""
IsWhole = Callable[[Mapping[str, Any]], bool]
MANAGED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Packing(Solution):
    """The decision, with a plan for each chunk."""

    memory: MemoryMap
    parameters: tuple[nn.Parameter, ...]
    """The managed ones; a slot's ``key`` is an index into these."""
    groups: tuple[Group, ...]
    """What each of the parameters was packed by."""
    plans: tuple[ChunkPlan, ...]
    updated_buffer_count: int
    """Most buffers that the update of a chunk reads: blocks of as many are staged for one that is on DISK."""
    whole_numel: int = 0
    """Elements of a staged block in which any parameter fits that an update takes as a whole; 0 if there are none."""

    @property
    def update_staging(self) -> tuple[int, int]:
        """How many blocks updates stage, and their elements."""
        if self.whole_numel:
            return self.updated_buffer_count, self.whole_numel
        return BLOCK_SETS * self.updated_buffer_count, self.staging_block_numel

    def with_plans(self, plans: Sequence[ChunkPlan]) -> "Packing":
        """The same with other plans for some chunks."""
        other = {plan.layout.index: plan for plan in plans}
        new = tuple(other.get(plan.layout.index, plan) for plan in self.plans)
        nbytes = dict.fromkeys(Tier, 0)
        for plan in new:
            for name in plan.tiers:
                for tier, held in plan.parts(name):
                    nbytes[tier] += on_tier(held, tier)
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
    is_whole: IsWhole = lambda group: False,
) -> Packing:
    """Choose the chunk size, pack, and place. Changes nothing.

    Parameters
    ----------
    param_groups
        Of the optimizer; empty without one (nothing is trainable then).
    slots_of
        From a group to what the optimizer keeps for each element of its parameters.
    is_whole
        Whether the optimizer takes whole parameters of a group.

    Raises
    ------
    OutOfMemory
        If the tiers together are too small, or DEVICE is too small for one unit. The message says what to change.
    """
    named = managed_parameters(model)
    groups = _groups(model, named, param_groups, config, slots_of)
    buffers = max((buffer_count(group.states) for group in groups), default=0)
    whole_numel = _whole_numel([group for group in param_groups if is_whole(group)])
    problem = Problem(
        tensors=tuple(_spec(*item, group) for item, group in zip(named.items(), groups, strict=True)),
        needs=tuple(group.need for group in groups),
        use=_use(model, named),
        capacity=Capacity(nbytes=capacities.nbytes, memory=capacities.memory),
        policy=config.policy,
        chunk_numel=config.chunk_numel,
        search_range=config.search_range,
        search_step=config.search_step,
        compute_itemsize=_most_common_itemsize(named.values(), groups),
        max_prefetch=config.max_prefetch,
        borrows_gradients=config.update_in_backward,
        staging_blocks=FETCH_WORKERS + STORE_BLOCKS + (0 if whole_numel else BLOCK_SETS * buffers),
        whole_staging_bytes=buffers * whole_numel * 4,
    )
    found = solve(problem)
    if isinstance(found, Shortfall):
        raise out_of_memory(problem, found, capacities.budgets)
    of_chunks = [groups[layout.slots[0].key] for layout in found.layouts]
    return Packing(
        **{each.name: getattr(found, each.name) for each in fields(found)},
        memory=capacities.memory,
        parameters=tuple(named.values()),
        groups=groups,
        plans=plans(found.layouts, of_chunks, found.placement, capacities.memory),
        updated_buffer_count=buffers,
        whole_numel=whole_numel,
    )


def _whole_numel(param_groups: Sequence[Mapping[str, Any]]) -> int:
    """Elements of a block in which any parameter of these groups fits, wherever in its page it begins; 0 if none."""
    largest = max((p.numel() for group in param_groups for p in group["params"]), default=0)
    return align(largest, PAGE_NUMEL) + PAGE_NUMEL if param_groups else 0


def _groups(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    param_groups: Sequence[Mapping[str, Any]],
    config: GeminiConfig,
    slots_of: SlotsOf,
) -> tuple[Group, ...]:
    slots = [slots_of(group) for group in param_groups]
    group_of = {id(p): i for i, group in enumerate(param_groups) for p in group["params"]}
    with_statistics = {
        id(p)
        for m in model.modules()
        if getattr(m, "running_mean", None) is not None and config.compute_dtype is not None
        for p in m.parameters(recurse=False)
    }
    trained = {id(p): group_of[id(p)] for p in named.values() if p.requires_grad and id(p) in group_of}
    form, quantised = None, frozenset[int]()
    if config.quantization is not None:
        form, quantised = config.quantization.form, quantised_parameters(model, config.quantization, trained)
    found = []
    for parameter in named.values():
        index = trained.get(id(parameter), -1)
        states = slots[index] if index >= 0 else ()
        found.append(
            Group.of(
                config,
                index,
                parameter.dtype,
                states,
                keeps_fp32=id(parameter) in with_statistics,
                form=form if id(parameter) in quantised else None,
            )
        )
    return tuple(found)


def _most_common_itemsize(parameters: Iterable[nn.Parameter], groups: Iterable[Group]) -> int:
    """Bytes of an element of most full copies."""
    numel = Counter({4: 0})
    for parameter, group in zip(parameters, groups, strict=True):
        numel[group.compute_dtype.itemsize] += parameter.numel()
    return max(numel, key=numel.__getitem__)


def _spec(name: str, parameter: nn.Parameter, group: Group) -> TensorSpec:
    return TensorSpec(name, tuple(parameter.shape), _dense_stride(parameter), group, align_numel=group.align_numel)


def _dense_stride(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's own strides where they are a permutation of contiguous ones (channels_last), else contiguous."""
    expected = 1
    for size, stride in sorted(zip(parameter.shape, parameter.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if size != 1 and stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return tuple(parameter.stride())


def _use(model: nn.Module, named: Mapping[str, nn.Parameter]) -> Use:
    key_of = {id(parameter): key for key, parameter in enumerate(named.values())}
    owned = {
        module: frozenset(key_of[id(p)] for p in module.parameters(recurse=False) if id(p) in key_of)
        for module in model.modules()
    }
    units = nested_parameters(model, key_of)
    of_name = dict(units)
    siblings, stages = [], []
    for name, module in model.named_modules():
        stages.append(owned[module])
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            continue  # their members run one after the other, or in an order of the user's
        children = list(module.children())
        if not any(list(child.children()) for child in children):  # query, key and value, say
            stages.append(frozenset().union(*(owned[child] for child in children)))
        members = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        siblings.append((name, frozenset().union(*(of_name.get(member, frozenset()) for member in members))))
    return Use(units, siblings, stages)
