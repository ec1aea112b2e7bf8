"""Model data per tier: the trainer's own chunk search, packing and placement, asked without building anything."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from gemini.chunk import GRADIENT, SHADOW, BufferSpec, MemoryMap, Tier
from gemini.chunk.communicator import SingleProcess
from gemini.chunk.extent import Owner
from gemini.config import GeminiConfig
from gemini.errors import OutOfMemory
from gemini.lazy import LazyInitContext
from gemini.memory.capacity import Capacities
from gemini.memory.thread_stacks import stack_bytes
from gemini.memory.tracker import Budget
from gemini.nn.optimizer.rules.adam_rule import ADAM
from gemini.packing.packing import Packing, decide
from gemini.quantization import Quantization
from gemini.sizes import format_bytes

from .subject import Subject

GUARD = 0.05
"""Share of the non-model data kept free beside them: what allocators round up and kernels need for themselves."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is for one rank."""

    device_bytes: int | None
    """Memory of the accelerator; None: units run on the CPU, in RAM."""
    ram_bytes: int
    """RAM that this training may take, beyond what the interpreter and its libraries take already."""
    disk_bytes: int
    """0: no disk tier."""
    ranks: int = 1
    """That keep the model together, an extent of each chunk with each of them."""
    per_node: int = 1
    """Of them, those that share a machine: its RAM and disk are this number times the bytes above."""

    @property
    def neighbours(self) -> int:
        """Ranks on the machine that has most of them."""
        return min(self.ranks, self.per_node)

    @property
    def nodes(self) -> int:
        """Machines that it takes."""
        return -(-self.ranks // self.per_node)

    @property
    def memory(self) -> MemoryMap:
        return MemoryMap.UNIFIED if self.device_bytes is None else MemoryMap.ACCELERATOR


@dataclass(frozen=True, kw_only=True)
class TierDemand:
    """One tier at its peak, in bytes."""

    model_bytes: int
    non_model_bytes: int
    capacity_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.model_bytes + self.non_model_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.capacity_bytes

    def times(self, ranks: int) -> "TierDemand":
        """What a number of ranks need together; the one with the largest extents stands for each."""
        return TierDemand(
            model_bytes=ranks * self.model_bytes,
            non_model_bytes=ranks * self.non_model_bytes,
            capacity_bytes=ranks * self.capacity_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The whole answer for one batch size and sequence length."""

    tiers: Mapping[Tier, TierDemand]
    """Where device and host are the same RAM, HOST counts both and DEVICE is the full copies' part."""
    terms: Mapping[str, int]
    """What the bytes are, by name; they overlap where the names say so."""
    limits: Mapping[str, int]
    """``device_memory``, ``host_memory``, ``disk_memory`` to give to `GeminiPlugin`."""
    problem: str | None
    """Why it does not fit; None if it does."""

    @property
    def fits(self) -> bool:
        return self.problem is None and all(demand.fits for demand in self.tiers.values())


class ModelData:
    """Asks the trainer's packing about one model, built lazily once, with these optimizer states."""

    def __init__(self, subject: Subject, config: GeminiConfig, slots: Sequence[BufferSpec] = ADAM.slots({})) -> None:
        with LazyInitContext():
            self.model: nn.Module = subject.build()
        self.config = replace(config, quantization=Quantization.for_model(self.model, config.quantization))
        self.numel = sum(p.numel() for p in self.model.parameters())
        self.groups = [{"params": list(self.model.parameters())}]
        self.slots = tuple(slots)
        self.state_bytes = 4 + sum(slot.dtype.itemsize / slot.block_numel for slot in slots)
        """Of a parameter, master included."""

    def pack(self, limits: Mapping[Tier, int], memory: MemoryMap, ranks: int = 1) -> Packing:
        """The decision for these capacities, of the first of several ranks, whose extents are the largest.

        Raises
        ------
        OutOfMemory
            As `boost` would.
        """
        config = self.config if ranks == 1 else replace(self.config, communicator=FirstOf(ranks))
        return decide(self.model, self.groups, config, capacities(limits, memory), lambda group: self.slots)


class FirstOf(SingleProcess):
    """The communicator of a rank that is not there: packing asks it who owns what, and nothing else."""

    def __init__(self, count: int) -> None:
        self.owner = Owner(0, count)


def capacities(limits: Mapping[Tier, int], memory: MemoryMap) -> Capacities:
    pools = {tier: Budget(limits[tier], f"argument {tier.value}_memory") for tier in memory.pools}
    return Capacities(torch.device("cpu"), memory, {tier: pools[memory.pool(tier)] for tier in Tier}, None)


def demand(data: ModelData, non_model_bytes: int, machine: Machine, saved_on_disk_bytes: int = 0) -> Demand:
    """What a training needs that leaves ``non_model_bytes`` room where units run, and others on DISK."""
    memory = machine.memory
    aside = non_model_bytes + round(non_model_bytes * GUARD)
    stacks = stack_bytes(machine.disk_bytes > 0)
    limits = {
        Tier.DEVICE: max(1, (machine.device_bytes or 0) - aside),
        Tier.HOST: max(1, machine.ram_bytes - stacks - (aside if memory.compute_tier is Tier.HOST else 0)),
        Tier.DISK: max(0, machine.disk_bytes - saved_on_disk_bytes),
    }
    problem = None
    try:
        packing = data.pack(limits, memory, machine.ranks)
        model = model_bytes(packing, limits)
        terms = _terms(packing)
        problem = _too_narrow(packing, limits[memory.compute_tier])
    except OutOfMemory as error:
        problem = str(error)
        everything = _everything(data, machine.ranks)
        model, terms = {Tier.DEVICE: 0, Tier.HOST: everything, Tier.DISK: 0}, {}
    totals = {Tier.DEVICE: machine.device_bytes or machine.ram_bytes, Tier.HOST: machine.ram_bytes}
    non_model = {memory.compute_tier: non_model_bytes, Tier.DISK: saved_on_disk_bytes}
    tiers = {
        tier: TierDemand(
            model_bytes=model[tier],
            non_model_bytes=non_model.get(tier, 0),
            capacity_bytes=totals.get(tier, machine.disk_bytes),
        )
        for tier in Tier
    }
    limits[Tier.DISK] = machine.disk_bytes  # which saved tensors share
    given = {f"{tier.value}_memory": limits[tier] for tier in memory.pools if limits[tier]}
    return Demand(tiers=tiers, terms={**terms, "non_model": non_model_bytes}, limits=given, problem=problem)


def model_bytes(packing: Packing, limits: Mapping[Tier, int]) -> dict[Tier, int]:
    """The ledger's peaks: homes, staging, and as many full copies as there is room for."""
    found = dict(packing.placement.nbytes)
    found[Tier.HOST] += packing.staging_bytes
    for tier, nbytes in packing.placement.gradient_room.items():
        found[tier] += nbytes
    where = packing.memory.compute_tier
    room = limits[where] - found[where]
    copies = sorted(_copies(packing))
    if sum(copies) > room:
        copies = _that_fit(copies, room if packing.full_copies_limit_bytes is None else packing.full_copies_limit_bytes)
    found[where] += sum(copies)
    if where is not Tier.DEVICE:
        found[Tier.DEVICE] = sum(copies)
    return found


def room_for_copies(packing: Packing, limits: Mapping[Tier, int]) -> int:
    """Bytes that homes, staging and gradients leave for full copies where units run."""
    where = packing.memory.compute_tier
    staging = packing.staging_bytes if where is Tier.HOST else 0
    room = limits[where] - packing.placement.nbytes[where] - staging - packing.placement.gradient_room.get(where, 0)
    return room if packing.full_copies_limit_bytes is None else min(room, packing.full_copies_limit_bytes)


def _too_narrow(packing: Packing, limit: int) -> str | None:
    """Training may find out that units use their chunks together for whose full copies there is room one by one."""
    tier = packing.memory.compute_tier
    room = limit - packing.placement.nbytes[tier] - (packing.staging_bytes if tier is Tier.HOST else 0)
    if room >= packing.sibling_peak_bytes:
        return None
    return (
        f"full copies that may be in use together take {format_bytes(packing.sibling_peak_bytes)}, "
        f"homes leave {format_bytes(max(room, 0))} of {tier.value}"
    )


def _that_fit(copies: Sequence[int], room: int) -> list[int]:
    """The planner keeps as many as it can; chunks are about equally long, so any choice comes to about the same."""
    kept: list[int] = []
    for nbytes in reversed(copies):
        if sum(kept) + nbytes <= room:
            kept.append(nbytes)
    return kept


def _copies(packing: Packing) -> list[int]:
    """Bytes of each chunk's full copy beside its home."""
    return [0 if plan.full_is_home else plan.layout.numel * plan.compute_dtype.itemsize for plan in packing.plans]


def _terms(packing: Packing) -> dict[str, int]:
    masters = moments = gradients = waste = 0
    for plan in packing.plans:
        masters += sum(plan.nbytes(spec.name) for spec in plan.codec.specs if spec.name != SHADOW)
        moments += sum(plan.nbytes(spec.name) for spec in plan.states)
        gradients += plan.nbytes(GRADIENT) if GRADIENT in plan.tiers else 0
        for name in plan.tiers:
            waste += plan.nbytes(name) * (plan.layout.numel - plan.layout.used_numel) // plan.layout.numel
    largest = max((slot.numel for plan in packing.plans for slot in plan.layout.slots), default=0)
    return {
        "masters": masters,
        "moments": moments,
        "gradients": gradients + sum(packing.placement.gradient_room.values()),
        "padding_within_these": waste,
        "staging": packing.staging_bytes,
        "chunk_count": len(packing.plans),
        "chunk_numel": max((plan.layout.numel for plan in packing.plans), default=0),
        "load_peak_beyond_homes": 2 * 4 * largest,
    }


def _everything(data: ModelData, ranks: int) -> int:
    """Homes of masters, states and gradients; of several ranks each collects whole gradients beside them."""
    packing = data.pack(dict.fromkeys(Tier, sys.maxsize), MemoryMap.UNIFIED)
    homes = sum(plan.nbytes(name) for plan in packing.plans for name in plan.tiers)
    collected = sum(plan.nbytes(GRADIENT) for plan in packing.plans if GRADIENT in plan.tiers) if ranks > 1 else 0
    return homes // ranks + collected


def arguments(found: Demand, config: GeminiConfig, offload_dir: str | None) -> str:
    """What fits, ready to paste."""
    parts = [f'precision="{config.precision}"']
    parts += [f"{name}=True" for name in ("update_in_backward", "split_master") if getattr(config, name)]
    if config.activation_policy not in (None, "keep"):
        parts.append(f'activation_policy="{config.activation_policy}"')
    parts += [f'quantize="{config.quantization.format}"'] if config.quantization is not None else []
    parts += [f"{name}={as_argument(nbytes, up=True)}" for name, nbytes in found.limits.items() if nbytes >= 1024]
    if found.limits.get("disk_memory"):
        parts.append(f"offload_dir={offload_dir or '/path/on/a/fast/disk'!r}")
    return f"GeminiPlugin({', '.join(parts)})"


def as_argument(nbytes: int, *, up: bool = False) -> str:
    """A size as one writes it, rounded by less than two per cent: down for a limit, ``up`` for what must be enough."""
    shift, unit = (20, "MiB") if nbytes >= 64 << 20 else (10, "KiB")
    return f'"{-(-nbytes >> shift) if up else nbytes >> shift}{unit}"'


def with_machine(machine: Machine, **changes: int) -> Machine:
    return replace(machine, **changes)
