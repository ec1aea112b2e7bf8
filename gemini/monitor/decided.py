"""What was decided when a model was boosted, as telemetry writes it down."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..chunk import GRADIENT, Buffer, Chunk, ChunkManager, MemoryMap, Room, Tier
from ..chunk.extent import SOLE
from ..config import GeminiConfig
from ..memory.capacity import Capacities
from ..packing.packing import Packing, managed_parameters
from ..telemetry.records import Capacity, DescribedChunk, DescribedParameter, Description
from ..units.units import Unit


@dataclass(frozen=True, slots=True)
class Decided:
    """What was known when a model was boosted: enough to make the decision again."""

    config: GeminiConfig
    capacities: Capacities
    model_class: str
    parameter_numel: int
    """Elements of the managed parameters."""
    model: dict[str, Any] | None
    """See `model_facts`."""

    @staticmethod
    def of(model: nn.Module, config: GeminiConfig, capacities: Capacities) -> "Decided":
        """The facts of a model that is about to be boosted."""
        numel = sum(parameter.numel() for parameter in managed_parameters(model).values())
        return Decided(config, capacities, type(model).__name__, numel, model_facts(model))

    def facts(self, packing: Packing) -> dict[str, Any]:
        """What the first record of a run says."""
        config = self.config
        return {
            "model": self.model_class,
            "parameters": self.parameter_numel,
            "precision": config.precision,
            "placement_policy": type(config.policy).__name__,
            "chunk_numel": max((plan.layout.numel for plan in packing.plans), default=0),
            "capacities": {tier.value: budget.source for tier, budget in self.capacities.budgets.items()},
            "offload_dir": str(config.offload_dir) if config.offload_dir is not None else None,
        }

    def document(self, manager: ChunkManager, packing: Packing, units: Sequence[Unit]) -> Description:
        """Chunks, parameters and what the user asked for. Records refer to units by index."""
        parameters: dict[int, DescribedParameter] = {}
        chunks = []
        for index, (chunk, plan) in enumerate(zip(manager.chunks, packing.plans, strict=True)):
            keeps_fp32 = packing.groups[chunk.layout.slots[0].key].keeps_fp32
            for slot in chunk.layout.slots:
                parameters[slot.key] = DescribedParameter(
                    slot.name, list(slot.shape), index, plan.param_group, plan.is_trainable, keeps_fp32
                )
            form = packing.groups[chunk.layout.slots[0].key].form
            marks = (" frozen" if not plan.is_trainable else "") + (" fp32" if keeps_fp32 else "")
            marks += f" {form.name}" if form is not None else ""
            chunks.append(_described(chunk, f"{plan.param_group}{marks}"))
        budgets = self.capacities.budgets
        return Description(
            chunks=chunks,
            parameters=[parameters[key] for key in sorted(parameters)],
            units=[unit.name for unit in units],
            homes_bytes={tier.value: packing.placement.nbytes[tier] for tier in Tier},
            capacities={tier.value: Capacity(budget.bytes, budget.source) for tier, budget in budgets.items()},
            unified=self.capacities.memory is MemoryMap.UNIFIED,
            ram_bytes=self.capacities.ram_bytes,
            device_limit_bytes=self.capacities.device_limit_bytes,
            config=_options(self.config),
            model=self.model,
        )


def model_facts(model: nn.Module) -> dict[str, Any] | None:
    """What it takes to build a model of transformers again; None for any other."""
    config = getattr(model, "config", None)
    try:
        content = json.loads(config.to_json_string())  # type: ignore[union-attr]
        assert isinstance(content["model_type"], str)
    except Exception:  # another library's configuration, or none
        return None
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second of transformers before 5, where
    recomputes = next((getattr(model, name) for name in names if hasattr(type(model), name)), False)  # only it is there
    return {"class": type(model).__name__, "config": content, "checkpointing": bool(recomputes)}


def _described(chunk: Chunk, group: str) -> DescribedChunk:
    buffers: dict[str, Buffer | Room] = dict(chunk.homes)
    if chunk.gradient is not None and chunk.gradient.buffer is not None:
        buffers[GRADIENT] = chunk.gradient.buffer
    return DescribedChunk(
        numel=chunk.layout.numel,
        used_numel=chunk.layout.used_numel,
        full_bytes=chunk.full_nbytes,
        homes={name: "+".join(part.tier.value for part in home.parts) for name, home in buffers.items()},
        home_bytes={name: home.nbytes for name, home in buffers.items()},
        group=group,
        extent=None if chunk.plan.owner == SOLE else [chunk.extent.start, chunk.extent.stop],
    )


def _options(config: GeminiConfig) -> dict[str, Any]:
    return {
        "precision": config.precision,
        "policy": type(config.policy).__name__,
        "offload_optim_frac": getattr(config.policy, "offload_optim_frac", None),
        "offload_param_frac": getattr(config.policy, "offload_param_frac", None),
        "max_prefetch": config.max_prefetch,
        "update_in_backward": config.update_in_backward,
        "split_master": config.split_master,
        "quantize": None if config.quantization is None else config.quantization.format,
        "chunk_numel": config.chunk_numel,
        "device_memory": config.device_memory,
        "host_memory": config.host_memory,
        "disk_memory": config.disk_memory,
        "offload_dir": None if config.offload_dir is None else str(config.offload_dir),
        "pin_memory": config.pin_memory,
        "owners": config.communicator.owner.count,
    }
