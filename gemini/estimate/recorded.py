"""A run's model data as its records have them: enough to ask the trainer's own packing again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gemini.chunk import ABSMAX, ALONE, BufferSpec, MemoryMap, Tier
from gemini.config import GeminiConfig
from gemini.errors import OutOfMemory
from gemini.packing.packing import decide
from gemini.planning.placement import AutoPlacementPolicy, PlacementPolicy, StaticPlacementPolicy
from gemini.quantization import Quantization
from gemini.telemetry.records import DescribedChunk, DescribedParameter, Description

from ..torch_private import own_modules, own_parameters
from .demand import FirstOf, capacities, model_bytes
from .solve import MOST_RANKS


def packs(chunks: Description, limits: Mapping[Tier, int]) -> bool:
    """Ask the trainer's packing about the recorded parameters."""
    model = skeleton(chunks)
    groups = recorded_groups(chunks, model)
    try:
        packing = decide(
            model, groups, config_of(chunks), capacities(limits, memory_of(chunks)), lambda group: tuple(group["slots"])
        )
    except OutOfMemory:
        return False
    needed = model_bytes(packing, limits)
    return all(needed[tier] <= limits[tier] for tier in memory_of(chunks).pools)


def recorded_groups(chunks: Description, model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups, with ``slots`` for what it keeps in the chunks of each."""
    parameters = dict(model.named_parameters())
    groups: dict[int, list[DescribedParameter]] = {}
    for item in chunks.parameters:
        if item.param_group >= 0:
            groups.setdefault(item.param_group, []).append(item)
    return [
        {
            "params": [parameters[item.name] for item in groups[index]],
            "slots": state_slots([chunks.chunks[item.chunk] for item in groups[index]]),
        }
        for index in sorted(groups)
    ]


def state_slots(chunks: Sequence[DescribedChunk]) -> list[BufferSpec]:
    """What the optimizer keeps for the elements of these chunks.

    Only the bytes per element are recorded, and split masters where there are some; packing looks at nothing else.
    Masters are split with Adam's second moment alone, the last of its states. A rank may have none of a chunk at home,
    so the one counts that it has most of.
    """
    chunk = max((each for each in chunks if each.states), key=lambda each: each.kept_numel, default=None)
    if chunk is None:
        return []
    dtypes = {1: torch.uint8, 2: torch.bfloat16}
    sizes = {name: chunk.home_bytes.get(name, 0) // max(chunk.kept_numel, 1) for name in chunk.states}
    slots = [BufferSpec(name, dtypes.get(nbytes, torch.float32)) for name, nbytes in sizes.items()]
    return [replace(slot, has_spare_sign=True) if slot.name == "exp_avg_sq" else slot for slot in slots]


def skeleton(chunks: Description) -> nn.Module:
    """Modules with the recorded parameters, on ``meta``: what packing looks at, and nothing else."""
    root = nn.Module()
    for item in chunks.parameters:
        *path, leaf = item.name.split(".")
        module = root
        for part in path:
            is_layer = part is path[-1] and ABSMAX in chunks.chunks[item.chunk].homes
            made_for_it = nn.Linear(1, 1, bias=False, device="meta") if is_layer else nn.Module()
            child = own_modules(module).setdefault(part, made_for_it)
            assert child is not None
            module = child
        if item.keeps_fp32:
            module.running_mean = True  # type: ignore[assignment]
        empty = torch.empty(item.shape, dtype=_dtype(chunks, item), device="meta")
        made = nn.Parameter(empty, requires_grad=item.trainable)
        own_parameters(module)[leaf] = made
    return root


def _dtype(chunks: Description, item: DescribedParameter) -> torch.dtype:
    """What the parameter computes in, which is its own dtype if the precision is ``"keep"``."""
    chunk = chunks.chunks[item.chunk]
    return torch.bfloat16 if chunk.full_bytes == 2 * chunk.numel else torch.float32


def config_of(chunks: Description) -> GeminiConfig:
    recorded = chunks.config
    policy: PlacementPolicy = AutoPlacementPolicy()
    if recorded.get("policy") == "StaticPlacementPolicy":
        policy = StaticPlacementPolicy(
            offload_optim_frac=float(recorded.get("offload_optim_frac") or 0.0),
            offload_param_frac=float(recorded.get("offload_param_frac") or 0.0),
        )
    return GeminiConfig(
        precision=str(recorded.get("precision", "bf16")),
        policy=policy,
        max_prefetch=int(recorded.get("max_prefetch", 2)),
        update_in_backward=bool(recorded.get("update_in_backward")),
        split_master=bool(recorded.get("split_master")),
        quantization=Quantization.of(recorded.get("quantize")),
        chunk_numel=recorded.get("chunk_numel"),
        communicator=FirstOf(owners) if (owners := owners_of(chunks)) > 1 else ALONE,
    )


def owners_of(chunks: Description) -> int:
    """How many ranks keep the chunks together."""
    owners = chunks.config.get("owners")
    return owners if isinstance(owners, int) and 1 <= owners <= MOST_RANKS else 1


def memory_of(chunks: Description) -> MemoryMap:
    return MemoryMap.UNIFIED if chunks.unified else MemoryMap.ACCELERATOR


def limits_of(chunks: Description) -> dict[Tier, int]:
    return {Tier(tier): capacity.bytes for tier, capacity in chunks.capacities.items()}
