"""What the user asked for in one frozen value. What each argument may be is in `gemini.booster.arguments`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .chunk import ALONE, Communicator
from .lease.budget import Budget
from .planning.placement import AutoPlacementPolicy, PlacementPolicy
from .quantization import Quantization

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEEP = "keep"
"""The precision with which each parameter computes in the dtype that the model gave it."""

ACTIVATION_POLICIES = ("keep", "offload", "recompute", "auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class GeminiConfig:
    """The options of one boosted model."""

    precision: str = "bf16"
    """``"bf16"``, ``"fp16"`` or ``"fp32"``: the dtype of full copies and gradients; ``"keep"``: the parameter's own."""
    policy: PlacementPolicy = field(default_factory=AutoPlacementPolicy)
    device_memory: int | None = None
    """Bytes of model data on DEVICE; None finds out. On a box without an accelerator a number emulates one."""
    host_memory: int | None = None
    """Bytes of model data in RAM; None finds out."""
    disk_memory: int | None = None
    """Bytes on DISK; None takes what is free in ``offload_dir``."""
    budget: Budget | None = None
    """What the model shares with others; None: that of the process."""
    offload_dir: Path | None = None
    """Folder of the DISK tier; None: there is none."""
    snapshot_memory: int | None = None
    """Bytes of RAM that a save in the background may copy values to; None: half of what is free when it begins."""
    disk_checksums: bool = False
    """Compare what is read from DISK with the CRC-32 of what was written."""
    chunk_numel: int | None = None
    """Elements a chunk holds; None searches."""
    search_range: tuple[int, int] | None = None
    """Chunk sizes to try, in elements; None derives them from the model and the room there is."""
    search_step: int | None = None
    """Distance between chunk sizes tried, in elements; None picks one."""
    max_prefetch: int = 2
    """How many chunks may be on their way ahead of use."""
    pin_memory: bool = True
    """Page-lock the homes on HOST (CUDA only)."""
    max_norm: float = 0.0
    """Clip the gradients' 2-norm in every step; 0 for never."""
    update_in_backward: bool = False
    """Update each chunk as soon as backward needs it no more; the gradients are never all in memory at once."""
    split_master: bool = False
    """Keep masters as their bf16 full copy and the bits that this has no room for, where units can use that copy."""
    quantization: Quantization | None = None
    """How frozen linear layers are kept; None: in the compute dtype."""
    force_outputs_fp32: bool = False
    steady_device_ratio: float = 0.9
    """Share of the free device memory that a run may use (CUDA, when ``device_memory`` is None)."""
    warmup_non_model_ratio: float = 0.5
    """Share of that kept for activations before they have been measured."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """Arguments of the fp16 loss scaler."""
    telemetry: bool | Path = True
    """Write a run's records to the default folder, nowhere, or to this folder."""
    activation_policy: str | None = None
    """What becomes of tensors that are saved for backward: one of `ACTIVATION_POLICIES`; None: ``"keep"`` while memory
    suffices, then ``"auto"``."""
    verbose: bool = False
    communicator: Communicator = ALONE
    """The other ranks that keep the model together with this one."""
    sync_module_states: bool = False
    """With several ranks, start with the values of the first one on all; else they must be alike."""

    def __post_init__(self) -> None:
        if self.update_in_backward and not self.communicator.owner.is_alone:
            raise ValueError(
                "update_in_backward=True is for one process, this is one of several: "
                "gradients are summed over them when backward is over"
            )
        if self.update_in_backward and self.max_norm > 0:
            raise ValueError(
                f"update_in_backward=True cannot go with max_norm={self.max_norm}: the norm of all gradients is known "
                "only when backward is over; leave max_norm at 0, or update_in_backward off"
            )
        if self.update_in_backward and self.precision == "fp16":
            raise ValueError(
                "update_in_backward=True cannot go with precision='fp16': whether gradients overflow is known only "
                "when backward is over; use precision='bf16' or 'fp32', or leave update_in_backward off"
            )
        if self.split_master and self.precision != "bf16":
            raise ValueError(
                f"split_master=True needs precision='bf16', the upper half of fp32; it is {self.precision!r}"
            )
        if self.disk_memory is not None and self.offload_dir is None:
            raise ValueError("disk_memory is given but there is no disk tier; set offload_dir to a folder as well")

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Of parameters in use and of the model's inputs; None: each keeps its own."""
        return PRECISIONS.get(self.precision)

    def dtype_of(self, own: torch.dtype) -> torch.dtype:
        """In which a parameter computes that the model keeps in its ``own`` dtype."""
        return self.compute_dtype or own
