"""What the arguments of `GeminiPlugin` and of `Booster`'s methods may be, one line each."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemini.arguments.checked import NotAllowed, Table
from gemini.arguments.devices import Device
from gemini.arguments.places import FileNamePart, Folder, Name
from gemini.arguments.rules import Flag, Has, Instance, OneOf, OrNone, Real, Size, Unchecked, Whole
from gemini.chunk import FORMATS
from gemini.config import ACTIVATION_POLICIES, KEEP, PRECISIONS
from gemini.lease.budget import Budget
from gemini.quantization import Quantization


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """ColossalAI's dict of chunk sizes, which means the elements of a chunk."""

    allowed = "{1: {'chunk_size': elements}} for one rank, with a whole number of 1 or more"

    def meant(self, value: Any) -> int:
        try:
            size = value[1]["chunk_size"] if isinstance(value, Mapping) else None
        except (KeyError, TypeError, IndexError):
            size = None
        if size is None:
            raise NotAllowed(ValueError)
        try:
            return Whole(1).meant(size)
        except NotAllowed:
            raise NotAllowed(ValueError) from None


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Whether records are written, or where."""

    allowed = "True, False or a folder that can be written to, or made"

    def meant(self, value: Any) -> Any:
        return Flag().meant(value) if isinstance(value, int) else Folder().meant(value)


@dataclass(frozen=True, slots=True)
class Quantized:
    """What `Quantization.of` takes."""

    allowed = f"{', '.join(map(repr, FORMATS))}, a gemini.Quantization, True, False or None"

    def meant(self, value: Any) -> Any:
        if not (value is None or isinstance(value, bool | str | Quantization)):
            raise NotAllowed(TypeError)
        if isinstance(value, str) and value not in FORMATS:
            raise NotAllowed(ValueError)
        return value


@dataclass(frozen=True, slots=True)
class ShardSize:
    """MiB as a number, or a text."""

    allowed = 'a whole number of MiB, 1 or more, or a size such as "5GB"'

    def meant(self, value: Any) -> Any:
        return Size().meant(value) and value if isinstance(value, str) else Whole(1, 2**43 - 1).meant(value)


_FLAG, _SHARE, _SIZE = Flag(), Real(0, 1), OrNone(Size())
_SCALE = Real(0, has_low=False)
_MODEL = Instance((nn.Module,), "a torch.nn.Module")
_OPTIMIZER = Has(("state_dict", "param_groups"), "a torch.optim.Optimizer")
_SCHEDULER = Has(("state_dict", "load_state_dict", "step"), "a learning rate scheduler")
_ACCEPTED = Unchecked("ColossalAI's, never looked at")
_BY_TYPE = Unchecked("recognised by its type, in any place")

PLUGIN: Table = {
    "chunk_config_dict": OrNone(ChunkSize()),
    "chunk_init_device": OrNone(Device()),
    "placement_policy": OneOf(("auto", "static"), old=("cpu", "cuda")),
    "enable_gradient_accumulation": _FLAG,
    "max_prefetch": Whole(),
    "shard_param_frac": _SHARE,
    "offload_optim_frac": _SHARE,
    "offload_param_frac": _SHARE,
    "warmup_non_model_data_ratio": Real(0, 1, has_high=False),
    "steady_cuda_cap_ratio": Real(0, 1, has_low=False),
    "precision": OneOf((*PRECISIONS, KEEP)),
    "master_weights": _FLAG,
    "pin_memory": _FLAG,
    "force_outputs_fp32": _FLAG,
    "strict_ddp_mode": _FLAG,
    "search_range_m": Whole(0, 2**43),
    "hidden_dim": OrNone(Whole(1)),
    "min_chunk_size_m": OrNone(Real(2**-20, 2**40)),
    "memstats": _ACCEPTED,
    "gpu_margin_mem_ratio": _SHARE,
    "initial_scale": _SCALE,
    "min_scale": _SCALE,
    "growth_factor": Real(1),
    "backoff_factor": Real(0, 1, has_low=False, has_high=False),
    "growth_interval": Whole(1),
    "hysteresis": Whole(1),
    "max_scale": _SCALE,
    "max_norm": Real(0),
    "norm_type": Real(0, is_finite=False),
    "tp_size": Whole(1),
    "extra_dp_size": Whole(1),
    "enable_all_optimization": _FLAG,
    "enable_fused_normalization": _FLAG,
    "enable_flash_attention": _FLAG,
    "enable_sequence_parallelism": _FLAG,
    "enable_jit_fused": _FLAG,
    "enable_async_reduce": _FLAG,
    "use_fp8": _FLAG,
    "fp8_communication": _FLAG,
    "verbose": _FLAG,
    "device_memory": _SIZE,
    "host_memory": _SIZE,
    "disk_memory": _SIZE,
    "budget": OrNone(Instance((Budget,), "a gemini.Budget")),
    "offload_dir": OrNone(Folder()),
    "disk_checksums": _FLAG,
    "snapshot_memory": OrNone(Size(0)),
    "update_in_backward": _FLAG,
    "split_master": _FLAG,
    "quantize": Quantized(),
    "activation_policy": OrNone(OneOf(ACTIVATION_POLICIES)),
    "telemetry": Telemetry(),
    "process_group": Unchecked("group_of, which also looks at the dimensions of a mesh"),
    "hybrid_shard_size": OrNone(Whole(1)),
    "gradient_reduction": OneOf(("sum", "mean")),
    "sync_module_states": _FLAG,
}

PREPARE_DATALOADER: Table = {
    "dataset": Unchecked("whatever torch's DataLoader takes"),
    "batch_size": OrNone(Whole(1)),
    "shuffle": _FLAG,
    "seed": Whole(-(2**63)),
    "drop_last": _FLAG,
    "pin_memory": _FLAG,
    "num_workers": Whole(),
    "distributed_sampler_cls": OrNone(Has(("__call__",), "a class of samplers")),
}

BOOSTER: Table = {
    "device": OrNone(Device()),
    "mixed_precision": OrNone(OneOf((*PRECISIONS, KEEP))),
    "plugin": Unchecked("the plugin's class is not known here"),
}
BACKWARD: Table = {"loss": Instance((Tensor,), "a tensor"), "optimizer": Unchecked("the plugin asks for its own")}
NO_SYNC: Table = {"model": OrNone(_MODEL), "optimizer": OrNone(_OPTIMIZER)}
ENABLE_LORA: Table = {
    "model": _MODEL,
    "pretrained_dir": _BY_TYPE,
    "lora_config": _BY_TYPE,
    "bnb_quantization_config": _BY_TYPE,
    "quantize": Quantized(),
}
RESIZE: Table = {"model": _MODEL, "host_memory": _SIZE, "device_memory": _SIZE, "disk_memory": _SIZE}
RELEASE: Table = {"model": _MODEL, "folder": OrNone(Folder())}
RESUME: Table = {"model": _MODEL}

_PARTS: Table = dict.fromkeys(
    ("model", "optimizer", "lr_scheduler", "dataloader"), Unchecked("given_parts: an object, or a dict of them")
)
_SHARDED: Table = {"shard": _FLAG, "prefix": OrNone(FileNamePart()), "size_per_shard": ShardSize()}
_READ: Table = {"low_cpu_mem_mode": _FLAG, "num_threads": Whole(1), "strict": _FLAG, "verify": _FLAG}

SAVE: Table = {
    "folder": Name(),
    **_PARTS,
    "extra": Unchecked("anything that can be saved"),
    "keep": OrNone(Whole(1)),
    "size_per_shard": ShardSize(),
    "use_async": _FLAG,
    "layout": OneOf(("hf", "dcp")),
}
LOAD: Table = {
    "folder": Name(),
    **_PARTS,
    "extra": OrNone(Instance((MutableMapping,), "a dict, which is updated")),
    "strict": _FLAG,
    "verify": _FLAG,
    "rng": _FLAG,
}
SAVE_MODEL: Table = {
    "model": _MODEL,
    "checkpoint": Name(),
    **_SHARDED,
    "use_safetensors": _FLAG,
    "use_async": _FLAG,
    "gather_dtensor": _FLAG,
    "dtype": OrNone(Instance((torch.dtype,), "a torch.dtype")),
}
LOAD_MODEL: Table = {"model": _MODEL, "checkpoint": Name(), **_READ}
SAVE_OPTIMIZER: Table = {
    "optimizer": _OPTIMIZER,
    "checkpoint": Name(),
    **_SHARDED,
    "use_async": _FLAG,
    "gather_dtensor": _FLAG,
}
LOAD_OPTIMIZER: Table = {"optimizer": _OPTIMIZER, "checkpoint": Name(), **_READ}
LR_SCHEDULER: Table = {"lr_scheduler": _SCHEDULER, "checkpoint": Name()}
SAVE_LORA: Table = {"model": _MODEL, "checkpoint": Name(), "use_safetensors": _FLAG}
