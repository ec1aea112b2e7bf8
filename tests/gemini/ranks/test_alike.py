"""What all ranks must give to `boost`: the same options and the same optimizer."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import RankError
from gemini.nn.optimizer import HybridAdam

SIZES = {"host_memory": "64MiB", "telemetry": False}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def boosted_with(*options: dict[str, Any]) -> tuple[nn.Module, HybridAdam]:
    model = net()
    plugin = GeminiPlugin(**{**SIZES, **options[dist.get_rank()]})
    managed, optimizer, *_ = Booster(plugin=plugin).boost(model, HybridAdam(model.parameters()))
    return managed, optimizer  # type: ignore[return-value]


def refused_options(*options: dict[str, Any]) -> str:
    with pytest.raises(RankError) as refused:
        boosted_with(*options)
    return str(refused.value)


def refused_groups() -> str:
    model = net()
    parameters = [*model.parameters()][dist.get_rank() :]
    with pytest.raises(RankError) as refused:
        Booster(plugin=GeminiPlugin(**SIZES)).boost(model, HybridAdam(parameters))
    for parameter, value in zip(model.parameters(), net().parameters(), strict=True):
        assert torch.equal(parameter, value)
    model, optimizer, *_ = Booster(plugin=GeminiPlugin(**SIZES)).boost(model, HybridAdam(model.parameters()))
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    return str(refused.value)


def refused_without_optimizer() -> str:
    model = net()
    optimizer = HybridAdam(model.parameters()) if dist.get_rank() == 0 else None
    with pytest.raises(RankError) as refused:
        Booster(plugin=GeminiPlugin(**SIZES)).boost(model, optimizer)
    return str(refused.value)


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ({"precision": "fp32"}, {"precision": "bf16"}, "precision='bf16' (rank 0: 'fp32')"),
        ({"max_norm": 0.0}, {"max_norm": 0.5}, "max_norm=0.5 (rank 0: 0.0)"),
        ({}, {"gradient_reduction": "mean"}, "gradient_reduction='mean' (rank 0: 'sum')"),
        ({}, {"hybrid_shard_size": 1}, "hybrid_shard_size=1 (rank 0: 2)"),
        ({}, {"sync_module_states": True}, "sync_module_states=True (rank 0: False)"),
    ],
)
def test_other_options_on_a_rank_are_refused_by_name(worlds, first, second, difference):
    for told in worlds(2).run(refused_options, first, second):
        assert f"rank 1 has other options of GeminiPlugin than rank 0: {difference}. Give all ranks the same" in told


def test_sizes_of_memory_may_differ(worlds):
    worlds(2).run(boosts, {"host_memory": "32MiB"}, {"host_memory": "64MiB", "max_prefetch": 1})


def boosts(*options: dict[str, Any]) -> None:
    model, optimizer = boosted_with(*options)
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()


def test_other_parameters_in_the_optimizer_of_a_rank_are_refused_and_change_nothing(worlds):
    for told in worlds(2).run(refused_groups):
        assert "rank 1 has another optimizer than rank 0: 1 parameters are in other groups" in told
        assert "(0.weight)" in told


def test_a_rank_without_an_optimizer_is_refused(worlds):
    for told in worlds(2).run(refused_without_optimizer):
        assert "rank 1 has another optimizer than rank 0: 4 parameters are in other groups" in told


def test_a_process_of_several_without_a_process_group_is_told_that_it_trains_for_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = net()
    with pytest.warns(UserWarning, match=r"one of 2 processes .* Call gemini.launch_from_torch\(\) before"):
        Booster(plugin=GeminiPlugin(**SIZES)).boost(model, HybridAdam(model.parameters()))
