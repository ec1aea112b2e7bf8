"""What scripts ask a plugin, and what ColossalAI's other plugins say when they are made."""

from importlib import import_module

import pytest
import torch
import torch.distributed as dist

from gemini import booster as package
from gemini.booster import Booster
from gemini.booster import plugin as plugins
from gemini.booster.plugin import GeminiPlugin
from gemini.booster.plugin.dp_plugin_base import DPPluginBase
from gemini.nn.optimizer import HybridAdam

OTHERS = {
    "TorchDDPPlugin": 'GeminiPlugin(precision="fp32")',
    "TorchFSDPPlugin": "GeminiPlugin()",
    "LowLevelZeroPlugin": "GeminiPlugin(shard_param_frac=0.0)",
    "HybridParallelPlugin": "parallelize_module",
    "MoeHybridParallelPlugin": "experts",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_plugin_says_what_to_use_instead(name: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        getattr(plugins, name)(1, stage=2, tp_size=4)
    assert f"{name} is ColossalAI's and not part of gemini" in str(caught.value)
    assert OTHERS[name] in str(caught.value)


def test_scripts_may_ask_which_plugin_they_have() -> None:
    plugin = GeminiPlugin()
    assert (
        isinstance(plugin, plugins.Plugin) and isinstance(plugin, package.Plugin) and isinstance(plugin, DPPluginBase)
    )
    assert not any(isinstance(plugin, getattr(plugins, name)) for name in OTHERS)


def test_one_process_is_one_rank_of_everything() -> None:
    plugin = GeminiPlugin()
    sizes = plugin.dp_size, plugin.zero_size, plugin.extra_dp_size, plugin.tp_size, plugin.pp_size
    assert sizes == (1, 1, 1, 1, 1)


def test_the_sizes_are_those_of_the_process_group_also_if_it_is_younger(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = GeminiPlugin()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    assert (plugin.dp_size, plugin.zero_size, plugin.tp_size) == (4, 4, 1)


def test_each_precision_that_is_said_to_be_supported_trains() -> None:
    for precision in GeminiPlugin().supported_precisions():
        booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, initial_scale=1.0))
        model = torch.nn.Linear(4, 1)
        before = model.weight.detach().clone()
        model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=0.1))
        booster.backward(model(torch.ones(2, 4, dtype=model.weight.dtype)).sum(), optimizer)
        optimizer.step()
        assert not torch.equal(model.state_dict()["weight"], before), precision


def test_the_devices_are_the_cpu_and_what_torch_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert GeminiPlugin().supported_devices() == ["cpu"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert GeminiPlugin().supported_devices() == ["cpu", "xpu"]


def test_the_plugin_controls_what_the_booster_may_not() -> None:
    plugin = GeminiPlugin()
    assert plugin.control_device() and plugin.control_precision() and plugin.control_checkpoint_io()
    with pytest.raises(ValueError, match="the plugin controls the precision"):
        Booster(plugin=plugin, mixed_precision="fp16")


@pytest.mark.parametrize("in_backward", [False, True])
def test_no_sync_is_supported_exactly_where_it_works(in_backward: bool) -> None:
    plugin = GeminiPlugin(update_in_backward=in_backward)
    assert plugin.support_no_sync() is not in_backward
    if in_backward:
        with pytest.raises(ValueError, match="update_in_backward"):
            plugin.no_sync()
    else:
        with plugin.no_sync():
            pass


@pytest.mark.parametrize(
    "name",
    [
        *("enable_all_optimization", "enable_fused_normalization", "enable_flash_attention", "enable_jit_fused"),
        "enable_sequence_parallelism",
    ],
)
def test_what_colossalai_ignores_without_tensor_parallelism_is_ignored_with_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match=f"^{name} has no effect, .*; (use|build)") as caught:
        plugin = GeminiPlugin(**{name: True})
    assert [warning.filename for warning in caught] == [__file__]
    assert plugin.config == GeminiPlugin().config


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("gemini.shardformer", "ShardConfig"),
        ("gemini.shardformer", "PipelineGradientCheckpointConfig"),
        ("gemini.pipeline.schedule.v_schedule", "PipelineGraph"),
    ],
)
def test_settings_of_other_plugins_can_be_imported_and_name_the_way_out(module: str, name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} is ColossalAI's .*parallelize_module"):
        getattr(import_module(module), name)(num_ckpt_layers_per_stage=[1])


def test_pipelines_are_refused_with_the_calls_to_make_instead() -> None:
    with pytest.raises(NotImplementedError, match=r"booster\.backward\(loss, optimizer\)"):
        Booster().execute_pipeline(iter([]), None, None, None, return_loss=True)
