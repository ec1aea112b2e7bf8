"""What was decided when a model was boosted, as telemetry writes it down."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..chunk import GRADIENT, ChunkManager, MemoryMap, Tier
from ..config import GeminiConfig
from ..memory.capacity import Capacities
from ..packing.packing import Packing, managed_parameters
from ..telemetry.probes import Fields
from ..units.units import Unit

_OPTIONS = (
    *("precision", "max_prefetch", "update_in_backward", "split_master", "chunk_numel", "pin_memory"),
    *("device_memory", "host_memory", "disk_memory"),
)
"""What is written down as the user gave it."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What was known when a model was boosted: enough to make the decision again."""

    config: GeminiConfig
    capacities: Capacities
    model_class: str
    parameter_numel: int
    """Elements of the managed parameters."""
    model: Mapping[str, Any] | None
    """See `model_facts`."""

    @staticmethod
    def of(model: nn.Module, config: GeminiConfig, capacities: Capacities) -> "Decided":
        """The facts of a model that is about to be boosted."""
        numel = sum(parameter.numel() for parameter in managed_parameters(model).values())
        return Decided(config, capacities, type(model).__name__, numel, model_facts(model))

    def facts(self, packing: Packing) -> Fields:
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

    def document(self, manager: ChunkManager, packing: Packing, units: Sequence[Unit]) -> Fields:
        """Chunks, parameters and what the user asked for, as one JSON object. Records refer to units by index."""
        config, capacities = self.config, self.capacities
        parameters: dict[int, dict[str, Any]] = {}
        chunks = []
        for chunk, plan in zip(manager.chunks, packing.plans, strict=True):
            keeps_fp32 = packing.groups[chunk.layout.slots[0].key].keeps_fp32
            marks = (" frozen" if not plan.is_trainable else "") + (" fp32" if keeps_fp32 else "")
            buffers = dict(chunk.homes)
            if chunk.gradient is not None and chunk.gradient.buffer is not None:
                buffers[GRADIENT] = chunk.gradient.buffer
            for slot in chunk.layout.slots:
                parameters[slot.key] = {
                    "name": slot.name,
                    "shape": list(slot.shape),
                    "chunk": chunk.index,
                    "param_group": plan.param_group,
                    "trainable": plan.is_trainable,
                    "keeps_fp32": keeps_fp32,
                }
            chunks.append(
                {
                    "numel": chunk.layout.numel,
                    "used_numel": chunk.layout.used_numel,
                    "full_bytes": chunk.full_nbytes,
                    "homes": {name: home.tier.value for name, home in buffers.items()},
                    "home_bytes": {name: home.nbytes for name, home in buffers.items()},
                    "group": f"{plan.param_group}{marks}",
                }
            )
        return {
            "chunks": chunks,
            "units": [unit.name for unit in units],
            "model": self.model,
            "parameters": [parameters[key] for key in sorted(parameters)],
            "homes_bytes": {tier.value: packing.placement.nbytes[tier] for tier in Tier},
            "capacities": {
                tier.value: {"bytes": budget.bytes, "source": budget.source}
                for tier, budget in capacities.budgets.items()
            },
            "unified": capacities.memory is MemoryMap.UNIFIED,
            "ram_bytes": capacities.ram_bytes,
            "device_limit_bytes": capacities.device_limit_bytes,
            "config": {
                "policy": type(config.policy).__name__,
                "offload_optim_frac": getattr(config.policy, "offload_optim_frac", None),
                "offload_param_frac": getattr(config.policy, "offload_param_frac", None),
                "offload_dir": None if config.offload_dir is None else str(config.offload_dir),
                **{name: getattr(config, name) for name in _OPTIONS},
            },
        }


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
