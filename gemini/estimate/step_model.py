"""The time of a step: a packing, and what this machine was measured to do, for the simulation of a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gemini.chunk import GRADIENT, MASTER, SHADOW, ChunkPlan, MemoryMap, Tier
from gemini.packing.packing import Packing
from gemini.planning.step_time import Begin, ChunkTraffic, DiskRates, Order, Step, Visit, step_time
from gemini.torch_private import own_parameters

FORWARD, BACKWARD = 2.0, 4.0
"""Floating-point operations a parameter and token: one product forward, two backward, each a product and a sum."""
ADAM_BYTES = 12
"""Of a parameter's master and states, for which the speed of updates was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a step computes, beside the model."""

    tokens: int
    """Of one rank, in a step."""
    checkpointing: bool
    state_bytes: float
    """Of a parameter, master included. Another optimizer reads and writes that much more or less than Adam."""
    in_backward: bool
    """All updates begin when gradients are complete (``update_in_backward``)."""
    ahead: bool
    """Those of chunks on disk do: one rank, no clipping, no loss scale."""
    prefetched: int


@dataclass(frozen=True, slots=True)
class Use:
    """A module with parameters of its own, as forward comes to it."""

    chunks: tuple[int, ...]
    numel: int
    """Elements that each token is multiplied by; none of those that are only looked up."""


def step_seconds(
    model: nn.Module, packing: Packing, room_bytes: int, training: Training, speed: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of a step (``step``), of what takes them, and what computing waits for the disk; all they overlap.

    What was not measured is left out; without the speed of computing there is no step.

    Parameters
    ----------
    room_bytes
        For full copies.
    speed
        As `bench` measured it.
    """
    streamed = streamed_copies(packing.plans, room_bytes)
    traffic = {plan.layout.index: _traffic(plan, training, speed) for plan in packing.plans}
    flops = speed.get("training_flops_per_second") or speed.get("flops_per_second")
    early = early_updates(packing, training)
    step = _step(uses(model, packing), streamed, early, traffic, training, packing.memory, flops or 1.0)
    uploaded = sum(_copy_nbytes(plan) for plan in packing.plans if plan.layout.index in streamed)
    found = {
        "uploading": _per(2 * uploaded, speed.get("host_to_device")),
        "optimizer": sum(chunk.update_seconds for chunk in traffic.values()),
    }
    if flops:
        found["computing"] = sum(visit.seconds for visit in (*step.forward, *step.backward))
    disk = disk_rates(speed)
    if disk is not None and flops:
        times = step_time(step, disk)
        found |= {"disk": times.disk_seconds, "waiting": times.waiting_seconds if times.disk_seconds else 0.0}
        found["step"] = max(times.seconds, found["uploading"])
    elif flops and not any(_moves(chunk) for chunk in traffic.values()):
        found["step"] = max(found["computing"] + found["optimizer"], found["uploading"])
    return {name: seconds for name, seconds in found.items() if seconds}


def disk_rates(speed: Mapping[str, float]) -> DiskRates | None:
    """Of the disk that was measured, if there is one; files of before know no mixed rate, which lies between."""
    read, write = speed.get("disk_to_host"), speed.get("host_to_disk")
    if not read or not write:
        return None
    return DiskRates(read=read, write=write, mixed=speed.get("disk_mixed") or 2 / (1 / read + 1 / write))


def uses(model: nn.Module, packing: Packing) -> list[Use]:
    """The modules that have parameters, in the order of the model; a tied one comes at each of its places."""
    chunk_of = {
        id(packing.parameters[slot.key]): plan.layout.index for plan in packing.plans for slot in plan.layout.slots
    }
    found = []
    for module in model.modules():
        own = [p for p in own_parameters(module).values() if p is not None and id(p) in chunk_of]
        if own:
            is_looked_up = isinstance(module, nn.Embedding | nn.EmbeddingBag)
            chunks = tuple(dict.fromkeys(chunk_of[id(p)] for p in own))
            found.append(Use(chunks, 0 if is_looked_up else sum(p.numel() for p in own)))
    return found


def streamed_copies(plans: Sequence[ChunkPlan], room_bytes: int) -> frozenset[int]:
    """Chunks whose full copies are made for each use, as there is no room to keep them; chunks are about equally long.

    If not all have room, two uses side by side need it for theirs.
    """
    copies = {plan.layout.index: _copy_nbytes(plan) for plan in plans if plan.tiers[MASTER] is not Tier.DEVICE}
    free = room_bytes
    if sum(copies.values()) > room_bytes:
        free -= 2 * max(copies.values())
    streamed = set()
    for index, nbytes in copies.items():
        if nbytes and nbytes > free:
            streamed.add(index)
        else:
            free -= nbytes
    return frozenset(streamed)


def early_updates(packing: Packing, training: Training) -> frozenset[int]:
    """Chunks that are on disk with all that an update changes, if their updates begin ahead of the step.

    They are done beside their homes (`UpdatesAhead`), and their full copies are made anew in the next forward.
    """
    if not training.ahead or training.in_backward:
        return frozenset()
    return frozenset(plan.layout.index for plan in packing.plans if plan.is_trainable and _is_on_disk(plan))


def _is_on_disk(plan: ChunkPlan) -> bool:
    return all(tier is Tier.DISK for name in plan.tiers if name != GRADIENT for tier, _ in plan.parts(name))


def _copy_nbytes(plan: ChunkPlan) -> int:
    """Of a full copy beside the home."""
    return 0 if plan.full_is_home else plan.layout.numel * plan.compute_dtype.itemsize


def _traffic(plan: ChunkPlan, training: Training, speed: Mapping[str, float]) -> ChunkTraffic:
    streamed = plan.nbytes_on(Tier.DISK, [name for name in plan.tiers if name != GRADIENT])
    source = SHADOW if SHADOW in plan.tiers else MASTER
    elements = len(plan.extent) * training.state_bytes / ADAM_BYTES if plan.is_trainable else 0
    return ChunkTraffic(
        fetch_bytes=plan.nbytes_on(Tier.DISK, [source]),
        update_read_bytes=streamed if plan.is_trainable else 0,
        update_written_bytes=streamed if plan.is_trainable else 0,
        gradient_bytes=plan.nbytes_on(Tier.DISK, [GRADIENT]) if GRADIENT in plan.tiers else 0,
        update_seconds=_per(elements, speed.get("adam_elements_per_second")),
    )


def _step(
    uses: Sequence[Use],
    streamed: frozenset[int],
    early: frozenset[int],
    traffic: Mapping[int, ChunkTraffic],
    training: Training,
    memory: MemoryMap,
    flops: float,
) -> Step:
    again = FORWARD if training.checkpointing else 0.0
    forward = tuple(_visits(uses, streamed, FORWARD * training.tokens / flops, remade=early - streamed))
    backward = tuple(_visits(tuple(reversed(uses)), streamed, (BACKWARD + again) * training.tokens / flops))
    order = dict.fromkeys((*(chunk for use in uses for chunk in use.chunks), *traffic))
    return Step(
        forward=forward,
        backward=backward,
        chunks=traffic,
        order=Order(
            updates=tuple(order),
            begin=Begin.WHEN_COMPLETE if training.in_backward else Begin.AT_STEP,
            early=early,
            prefetched_visits=max(1, training.prefetched),
        ),
        updates_on_computing_cores=memory is MemoryMap.UNIFIED,
    )


def _visits(
    uses: Sequence[Use], streamed: frozenset[int], seconds: float, remade: frozenset[int] = frozenset()
) -> Iterator[Visit]:
    """What needs the same chunks one after the other is one visit, for which a copy is made once.

    Parameters
    ----------
    remade
        Chunks whose copies are made for their first use alone.
    """
    left = set(remade)
    chunks: tuple[int, ...] | None = None
    numel = 0
    for use in (*uses, Use((), 0)):
        if chunks is not None and use.chunks != chunks:
            fetched = tuple(c for c in chunks if c in streamed or c in left)
            left.difference_update(chunks)
            yield Visit(chunks=chunks, seconds=numel * seconds, fetched=fetched)
            numel = 0
        chunks = use.chunks
        numel += use.numel


def _moves(chunk: ChunkTraffic) -> bool:
    return bool(chunk.fetch_bytes or chunk.update_read_bytes or chunk.gradient_bytes)


def _per(amount: float, speed: float | None) -> float:
    return amount / speed if amount and speed else 0.0
