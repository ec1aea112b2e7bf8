"""The public contract: names, where they are imported from, and the parameters they take."""

import importlib
import inspect
import subprocess
import sys

import pytest

import gemini

EXPORTS = {
    "launch": "gemini.initialize",
    "launch_from_slurm": "gemini.initialize",
    "launch_from_torch": "gemini.initialize",
    "Booster": "gemini.booster",
    "GeminiPlugin": "gemini.booster.plugin",
    "LazyInitContext": "gemini.lazy",
    "HybridAdam": "gemini.nn.optimizer",
    "named_tensors": "gemini.checkpoint",
    "Quantization": "gemini.quantization",
    "to_torch": "gemini.boosting.plain",
    "Budget": "gemini.lease.budget",
    "EMA": "gemini.boosting.averaging",
    "SWA": "gemini.boosting.averaging",
}

PLUGIN_KEYWORDS_OF_COLOSSALAI = """
    chunk_config_dict placement_policy enable_gradient_accumulation max_prefetch shard_param_frac offload_optim_frac
    offload_param_frac warmup_non_model_data_ratio steady_cuda_cap_ratio precision master_weights pin_memory
    search_range_m hidden_dim min_chunk_size_m gpu_margin_mem_ratio initial_scale min_scale growth_factor backoff_factor
    growth_interval hysteresis max_scale max_norm norm_type verbose force_outputs_fp32 strict_ddp_mode
""".split()

OURS = {"device_memory": None, "host_memory": None, "disk_memory": None, "offload_dir": None, "telemetry": True}

BOOSTER_METHODS = {
    "boost": "model optimizer=None criterion=None dataloader=None lr_scheduler=None",
    "backward": "loss optimizer",
    "no_sync": "model optimizer",
    "save_model": ("model checkpoint shard=False prefix=None size_per_shard=1024 use_safetensors=True use_async=False"),
    "load_model": "model checkpoint strict=True",
    "save_optimizer": "optimizer checkpoint shard=False prefix=None size_per_shard=1024",
    "load_optimizer": "optimizer checkpoint",
    "save_lr_scheduler": "lr_scheduler checkpoint",
    "load_lr_scheduler": "lr_scheduler checkpoint",
    "enable_lora": None,
}

COLOSSALAIS = {
    "gemini.accelerator": "get_accelerator",
    "gemini.booster": "Booster Plugin",
    "gemini.booster.plugin": "GeminiPlugin HybridParallelPlugin LowLevelZeroPlugin MoeHybridParallelPlugin Plugin "
    "TorchDDPPlugin TorchFSDPPlugin",
    "gemini.booster.plugin.dp_plugin_base": "DPPluginBase",
    "gemini.cluster": "DistCoordinator",
    "gemini.cluster.dist_coordinator": "DistCoordinator",
    "gemini.lazy": "LazyInitContext",
    "gemini.logging": "DistributedLogger disable_existing_loggers get_dist_logger",
    "gemini.nn": "CosineAnnealingWarmupLR HybridAdam LinearWarmupLR",
    "gemini.nn.lr_scheduler": "CosineAnnealingLR CosineAnnealingWarmupLR ExponentialLR FlatAnnealingLR LambdaLR "
    "FlatAnnealingWarmupLR LinearWarmupLR MultiStepLR MultiStepWarmupLR MultiplicativeLR OneCycleLR PolynomialLR "
    "PolynomialWarmupLR StepLR",
    "gemini.nn.optimizer": "CPUAdam FusedAdam HybridAdam",
    "gemini.pipeline.schedule.v_schedule": "PipelineGraph",
    "gemini.shardformer": "PipelineGradientCheckpointConfig ShardConfig",
    "gemini.utils": "MultiTimer Timer conditional_context ensure_path_exists get_current_device set_seed",
}
"""Modules and names that ColossalAI's scripts import, with ``gemini`` for ``colossalai``."""

ERRORS = ("GeminiError", "OutOfMemory", "StateError", "CheckpointError", "LazyInitError", "OffloadError")


def signature_of(callable_: object) -> str:
    """``"a b=1"``: names and defaults without annotations, self, and what collects further arguments."""
    parameters = inspect.signature(callable_).parameters.values()  # type: ignore[arg-type]
    kept = [p for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return " ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in kept)


def test_the_exported_names_are_exactly_these() -> None:
    assert set(gemini.__all__) == {*EXPORTS, "__version__"}
    assert len(gemini.__all__) == len(set(gemini.__all__))
    assert set(gemini.__all__) <= set(dir(gemini))


@pytest.mark.parametrize("name", EXPORTS)
def test_a_name_is_the_same_object_from_both_of_its_import_paths(name: str) -> None:
    assert getattr(gemini, name) is getattr(importlib.import_module(EXPORTS[name]), name)


def test_importing_gemini_loads_neither_torch_nor_any_part() -> None:
    code = (
        "import sys, gemini\n"
        "assert 'torch' not in sys.modules\n"
        "assert [name for name in sys.modules if name.startswith('gemini.')] == []\n"
        "assert issubclass(gemini.errors.OutOfMemory, gemini.errors.GeminiError)\n"
        "assert gemini.__version__\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


@pytest.mark.parametrize("module", COLOSSALAIS)
def test_what_colossalais_scripts_import_is_there_and_exported(module: str) -> None:
    assert set(COLOSSALAIS[module].split()) <= set(importlib.import_module(module).__all__)


def test_modules_that_colossalai_loads_with_itself_are_there_without_an_import() -> None:
    code = (
        "import gemini, sys\n"
        "assert gemini.accelerator.get_accelerator().name\n"
        "assert gemini.cluster.DistCoordinator().rank == 0\n"
        "assert gemini.utils.get_current_device() and gemini.logging.get_dist_logger()\n"
        "assert not any(name.startswith(('gemini.boosting', 'gemini.chunk')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib import metadata

    assert gemini.__version__ == metadata.version("gemini-memory")


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Boaster'"):
        _ = gemini.Boaster  # type: ignore[attr-defined]


def test_booster_takes_what_the_contract_says() -> None:
    assert signature_of(gemini.Booster) == "device=None mixed_precision=None plugin=None"


@pytest.mark.parametrize("method", BOOSTER_METHODS)
def test_a_booster_method_takes_what_the_contract_says(method: str) -> None:
    expected = BOOSTER_METHODS[method]
    function = getattr(gemini.Booster, method)
    if expected is not None:
        names, further = signature_of(function).split(), []
        promised = expected.split()
        names, further = names[: len(promised)], names[len(promised) :]
        # What the contract requires may have a default, and ours may follow with one: no call of a user's breaks.
        required = {promise for promise in promised if "=" not in promise}
        assert [short if (short := name.split("=")[0]) in required else name for name in names] == promised
        assert all("=" in name for name in further)


def test_the_plugin_takes_colossalais_keywords_and_ours() -> None:
    parameters = inspect.signature(gemini.GeminiPlugin).parameters
    missing = [name for name in [*PLUGIN_KEYWORDS_OF_COLOSSALAI, *OURS] if name not in parameters]
    assert missing == []
    for name, default in OURS.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert parameters[name].default == default, name
    assert parameters["placement_policy"].default == "auto"
    assert parameters["precision"].default == "bf16"
    assert all(p.default is not p.empty for p in parameters.values() if p.kind is not p.VAR_KEYWORD)


def test_the_plugin_prepares_dataloaders() -> None:
    expected = (
        "dataset batch_size shuffle=False seed=1024 drop_last=False pin_memory=False num_workers=0 "
        "distributed_sampler_cls=None"
    )
    assert signature_of(gemini.GeminiPlugin.prepare_dataloader) == expected


def test_hybrid_adam_takes_what_the_contract_says() -> None:
    assert signature_of(gemini.HybridAdam) == (
        "model_params lr=0.001 bias_correction=True betas=(0.9, 0.999) eps=1e-08 weight_decay=0.0 adamw_mode=True "
        "nvme_offload_fraction=0.0 nvme_offload_dir=None states='fp32'"
    )


def test_lazy_initialisation_takes_what_the_contract_says() -> None:
    from gemini.lazy import LazyInitContext, is_lazy

    assert signature_of(LazyInitContext) == "default_device=None"
    assert signature_of(LazyInitContext.materialize) == "module device_mesh=None placements=None"
    assert signature_of(is_lazy) == "tensor"


def test_named_tensors_takes_the_model() -> None:
    assert signature_of(gemini.named_tensors) == "model"


def test_every_error_is_a_gemini_error() -> None:
    import torch

    for name in ERRORS:
        assert issubclass(getattr(gemini.errors, name), gemini.errors.GeminiError)
    assert issubclass(gemini.errors.OutOfMemory, torch.OutOfMemoryError)


def test_launching_a_single_process_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = torch.random.get_rng_state()
    gemini.launch_from_torch({})
    gemini.launch_from_torch()
    assert not torch.distributed.is_initialized()
    assert torch.equal(before, torch.random.get_rng_state())
