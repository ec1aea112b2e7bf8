"""Each function whose arguments users type, with values that each of its arguments may not have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from wrong_values import CHOICES, FLAGS, HUGE, INF, NAN, NUMBERS, OBJECTS, SIZES, SIZES_NOT_ZERO, TENSOR, WHOLES, Places

from gemini import Booster, Budget, GeminiPlugin, HybridAdam, LazyInitContext, Quantization
from gemini.sizes import parse_bytes


@dataclass(frozen=True)
class Entry:
    name: str
    call: Callable[..., Any]
    """With the wrong argument by its name, and the others right."""
    wrong: Mapping[str, tuple[Any, ...]]
    unchecked: Mapping[str, str]
    """Arguments that take anything, and why."""
    named: str | None = None
    """How the message calls the argument, where it is not by its name."""

    @property
    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = self.call.func if isinstance(self.call, partial) else self.call
        return function


PARAMETER = nn.Parameter(torch.ones(2))


def plugin(places: Places) -> Entry:
    flags = (
        "enable_gradient_accumulation", "master_weights", "pin_memory", "force_outputs_fp32", "strict_ddp_mode",
        "enable_all_optimization", "enable_fused_normalization", "enable_flash_attention",
        "enable_sequence_parallelism", "enable_jit_fused", "enable_async_reduce", "use_fp8", "fp8_communication",
        "verbose", "disk_checksums", "update_in_backward", "split_master", "sync_module_states",
    )  # fmt: skip
    above_1 = (*NUMBERS, 1.5)
    wrong: dict[str, tuple[Any, ...]] = {
        "chunk_config_dict": (
            "x", "", b"x", 1, True, [], TENSOR, {2: {"chunk_size": 1}}, {1: {}}, {1: 3}, {1: {"chunk_size": "8"}},
            {1: {"chunk_size": 0}}, {1: {"chunk_size": 2.5}}, {1: {"chunk_size": True}}, {1: {"chunk_size": HUGE}},
        ),
        "chunk_init_device": ("nowhere", "", b"cpu", 1.5, [], TENSOR, NAN, HUGE),
        "placement_policy": (*CHOICES, None),
        "precision": (*CHOICES, None),
        "gradient_reduction": (*CHOICES, None),
        "activation_policy": CHOICES,
        "max_prefetch": (*WHOLES, None),
        "search_range_m": (*WHOLES, None),
        "hidden_dim": (*WHOLES, 0),
        "min_chunk_size_m": tuple(value for value in (*NUMBERS, 0, HUGE) if value is not None),
        "hybrid_shard_size": (*WHOLES, 0),
        "growth_interval": (*WHOLES, None, 0),
        "hysteresis": (*WHOLES, None, 0),
        **dict.fromkeys(
            ("shard_param_frac", "offload_optim_frac", "offload_param_frac", "steady_cuda_cap_ratio",
             "warmup_non_model_data_ratio", "gpu_margin_mem_ratio"), above_1,
        ),
        "initial_scale": (*NUMBERS, 0.0),
        "min_scale": (*NUMBERS, 0.0),
        "max_scale": (*NUMBERS, 0.0),
        "growth_factor": (*NUMBERS, 0.5),
        "backoff_factor": (*NUMBERS, 0.0, 1.5),
        "max_norm": NUMBERS,
        "norm_type": ("2", "", b"2", True, NAN, None, [2.0], TENSOR),
        "tp_size": (*WHOLES, None, 0),
        "extra_dp_size": (*WHOLES, None, 0),
        **dict.fromkeys(flags, FLAGS),
        **dict.fromkeys(("device_memory", "host_memory", "disk_memory"), SIZES),
        "snapshot_memory": SIZES_NOT_ZERO,
        "budget": OBJECTS,
        "offload_dir": (*places.folders(), True),
        "quantize": ("x", "", b"nf4", 1, NAN, ["nf4"], TENSOR, HUGE),
        "telemetry": (*places.folders(), None),
        "process_group": OBJECTS,
    }  # fmt: skip
    return Entry("GeminiPlugin", GeminiPlugin, wrong, {"memstats": "ColossalAI's, never looked at"})


def booster(places: Places) -> list[Entry]:
    made = Booster(plugin=GeminiPlugin(telemetry=False))
    model = nn.Linear(2, 2)
    optimizer = HybridAdam(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    target = places.folder / "target"
    per_shard = ("many", "", -1, 0, 1.5, NAN, b"5GB", True, None, [1], TENSOR, HUGE)
    models, optimizers = (*OBJECTS, None), (*OBJECTS, None)
    named = places.names()

    save = {"shard": FLAGS, "prefix": ("a/b", b"x", 1, True, [], TENSOR, "a\0b"), "size_per_shard": per_shard}
    accepted = {"low_cpu_mem_mode": FLAGS, "num_threads": (*WHOLES, None, 0), "strict": FLAGS, "verify": FLAGS}
    kinds = "recognised by its type, see test_booster.py"
    parts = dict.fromkeys(("model", "optimizer", "lr_scheduler", "dataloader"), "an object, or a dict of them")
    return [
        Entry(
            "Booster", Booster,
            {"device": ("nowhere", "", b"cpu", 1.5, [], TENSOR, NAN, HUGE), "mixed_precision": CHOICES,
             "plugin": OBJECTS},
            {},
        ),
        Entry("Booster.boost", made.boost, {}, {**dict.fromkeys(
            ("model", "optimizer", "criterion", "dataloader", "lr_scheduler"), kinds)}),
        Entry(
            "Booster.backward", partial(made.backward, loss=PARAMETER.sum(), optimizer=optimizer),
            {"loss": ("x", "", b"x", 1, 1.5, True, None, [], NAN), "optimizer": optimizers}, {},
        ),
        Entry("Booster.no_sync", made.no_sync, {"model": OBJECTS, "optimizer": OBJECTS}, {}),
        Entry(
            "Booster.resize", partial(made.resize, model=model),
            {"model": models, **dict.fromkeys(("host_memory", "device_memory", "disk_memory"), SIZES)}, {},
        ),
        Entry(
            "Booster.enable_lora", partial(made.enable_lora, model=model, pretrained_dir="adapters"),
            {"model": models, "quantize": ("x", "", b"nf4", 1, NAN, ["nf4"], TENSOR)},
            dict.fromkeys(("pretrained_dir", "lora_config", "bnb_quantization_config"),
                          "recognised by its type, see test_lora_uses.py"),
        ),
        Entry(
            "Booster.release", partial(made.release, model=model),
            {"model": models, "folder": places.folders()}, {},
        ),
        Entry("Booster.resume", made.resume, {"model": models}, {}),
        Entry(
            "Booster.save", partial(made.save, folder=target, model=model),
            {"folder": places.names(), "keep": (*WHOLES, 0), "size_per_shard": per_shard, "use_async": FLAGS,
             "layout": (*CHOICES, None)},
            {**parts, "extra": "whatever is to be saved"},
        ),
        Entry(
            "Booster.load", partial(made.load, folder=target, model=model),
            {"folder": places.names(), "strict": FLAGS, "verify": FLAGS, "rng": FLAGS,
             "extra": ("x", b"x", 1, True, NAN, TENSOR)},
            parts,
        ),
        Entry(
            "Booster.save_model", partial(made.save_model, model=model, checkpoint=target),
            {"model": models, "checkpoint": (*named, None), **save, "use_safetensors": FLAGS, "use_async": FLAGS,
             "gather_dtensor": FLAGS, "dtype": ("bf16", "", 1, True, NAN, [], TENSOR)}, {},
        ),
        Entry(
            "Booster.load_model", partial(made.load_model, model=model, checkpoint=target),
            {"model": models, "checkpoint": (*named, None), **accepted}, {},
        ),
        Entry(
            "Booster.save_optimizer", partial(made.save_optimizer, optimizer=optimizer, checkpoint=target),
            {"optimizer": optimizers, "checkpoint": (*named, None), **save, "use_async": FLAGS,
             "gather_dtensor": FLAGS}, {},
        ),
        Entry(
            "Booster.load_optimizer", partial(made.load_optimizer, optimizer=optimizer, checkpoint=target),
            {"optimizer": optimizers, "checkpoint": (*named, None), **accepted}, {},
        ),
        Entry(
            "Booster.save_lr_scheduler",
            partial(made.save_lr_scheduler, lr_scheduler=scheduler, checkpoint=target),
            {"lr_scheduler": optimizers, "checkpoint": (*named, None)}, {},
        ),
        Entry(
            "Booster.load_lr_scheduler",
            partial(made.load_lr_scheduler, lr_scheduler=scheduler, checkpoint=target),
            {"lr_scheduler": optimizers, "checkpoint": (*named, None)}, {},
        ),
        Entry(
            "Booster.save_lora_as_pretrained",
            partial(made.save_lora_as_pretrained, model=model, checkpoint=target),
            {"model": models, "checkpoint": (*named, None), "use_safetensors": FLAGS}, {},
        ),
        Entry(
            "GeminiPlugin.prepare_dataloader",
            partial(GeminiPlugin(telemetry=False).prepare_dataloader, dataset=[1, 2, 3], batch_size=1),
            {"batch_size": (*WHOLES, 0), "shuffle": FLAGS, "drop_last": FLAGS,
             "seed": (*(value for value in WHOLES if type(value) is not int), HUGE, None),
             "pin_memory": FLAGS, "num_workers": (*WHOLES, None),
             "distributed_sampler_cls": ("x", "", b"x", 1, True, NAN, [], TENSOR)},
            {"dataset": "whatever torch's DataLoader takes"},
        ),
    ]  # fmt: skip


def others(places: Places) -> list[Entry]:
    pairs = ("x", "", 0.9, None, True, (0.9,), (0.9, 0.9, 0.9), (0.9, NAN), (0.9, "x"), (0.9, 1.5), (-1, 0.9), TENSOR)
    rates = ("0.1", "", b"1", NAN, INF, -1.0, None, [0.1], TENSOR, 10**400)
    return [
        Entry(
            "HybridAdam", partial(HybridAdam, model_params=[PARAMETER]),
            {"lr": rates, "eps": rates, "weight_decay": rates, "betas": pairs, "bias_correction": FLAGS,
             "adamw_mode": FLAGS, "states": (*CHOICES, None), "nvme_offload_fraction": NUMBERS,
             "nvme_offload_dir": ("", b"x", 1, True, NAN, [], TENSOR, "a\0b"),
             "model_params": (1, None, True, NAN)},
            {},
        ),
        Entry(
            "Budget", Budget, dict.fromkeys(("host_memory", "device_memory", "disk_memory"), SIZES), {},
        ),
        Entry(
            "Quantization", Quantization,
            {"format": (*CHOICES, None), "skip": ("lm_head", 1, None, True, ["x"], (1,), ("",), (b"x",), TENSOR)}, {},
        ),
        Entry("LazyInitContext", LazyInitContext,
              {"default_device": ("nowhere", "", b"cpu", 1.5, [], TENSOR, NAN, HUGE, "meta", "cuda:99")}, {}),
        Entry("parse_bytes", parse_bytes, {"size": (*SIZES_NOT_ZERO, None)}, {}, named="expected"),
    ]  # fmt: skip


def entries(places: Places) -> list[Entry]:
    return [plugin(places), *booster(places), *others(places)]
