"""The decisions of boost: which parameters share chunks, where they live, and what to do when they do not fit."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gemini.chunk import FETCH_WORKERS, GRADIENT, MASTER, MemoryMap, Tier
from gemini.chunk.search import bounds
from gemini.config import GeminiConfig
from gemini.errors import OutOfMemory
from gemini.memory.capacity import Capacities, find_capacities
from gemini.memory.tracker import Budget
from gemini.packing.packing import Packing, decide, managed_parameters
from gemini.planning.placement import StaticPlacementPolicy
from gemini.updates.update_pipeline import BLOCK_SETS

PLENTY = 1 << 40
BUFFERS = (MASTER, "exp_avg", "exp_avg_sq", GRADIENT)


def capacities_of(device: int = 0, host: int = PLENTY, disk: int = 0, unified: bool = False) -> Capacities:
    nbytes = {Tier.DEVICE: host if unified else device, Tier.HOST: host, Tier.DISK: disk}
    budgets = {tier: Budget(n, f"test {tier.value}") for tier, n in nbytes.items()}
    memory = MemoryMap.UNIFIED if unified else MemoryMap.ACCELERATOR
    return Capacities(torch.device("cpu"), memory, budgets, None)


def config_of(**options: Any) -> GeminiConfig:
    return GeminiConfig(**{"chunk_numel": 1 << 12, **options})


def mlp(width: int = 64, depth: int = 4) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def all_of(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def names(packing: Packing) -> list[list[str]]:
    return [[slot.name for slot in plan.layout.slots] for plan in packing.plans]


# -- what shares a chunk


def test_without_an_optimizer_every_chunk_has_a_master_in_the_compute_dtype_only() -> None:
    packing = decide(mlp(), [], config_of(), capacities_of(unified=True))
    for plan in packing.plans:
        assert set(plan.tiers) == {MASTER} and plan.specs[MASTER].dtype is torch.bfloat16
        assert not plan.is_trainable


def test_trainable_parameters_have_states_and_a_gradient() -> None:
    model = mlp()
    for plan in decide(model, all_of(model), config_of(), capacities_of(unified=True)).plans:
        assert set(plan.tiers) == set(BUFFERS)
        assert plan.specs[MASTER].dtype is torch.float32 and plan.specs[GRADIENT].dtype is torch.bfloat16


def test_frozen_parameters_have_chunks_of_their_own_with_a_master_only() -> None:
    model = mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))
    packing = decide(model, all_of(model), config_of(), capacities_of(unified=True))
    for plan in packing.plans:
        kinds = {slot.name.split(".")[-1] for slot in plan.layout.slots}
        assert len(kinds) == 1
        assert set(plan.tiers) == ({MASTER} if kinds == {"bias"} else set(BUFFERS))


def test_a_parameter_that_no_optimizer_has_is_like_a_frozen_one() -> None:
    model = mlp(depth=2)
    groups = [{"params": [model[0].weight]}]
    packing = decide(model, groups, config_of(), capacities_of(unified=True))
    assert names(packing) == [["0.weight"], ["0.bias", "1.bias"], ["1.weight"]] or names(packing) == [
        ["0.weight"], ["0.bias"], ["1.weight"], ["1.bias"]
    ]  # fmt: skip
    assert ["exp_avg" in plan.tiers for plan in packing.plans] == [True] + [False] * (len(packing.plans) - 1)


def test_the_groups_of_an_optimizer_do_not_share_chunks() -> None:
    model = mlp()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2]},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    packing = decide(model, groups, config_of(chunk_numel=1 << 20), capacities_of(unified=True))
    assert names(packing) == [[f"{i}.weight" for i in range(4)], [f"{i}.bias" for i in range(4)]]
    assert [plan.param_group for plan in packing.plans] == [0, 1]


def test_slots_follow_the_order_of_the_model_and_keys_count_the_parameters() -> None:
    model = mlp()
    packing = decide(model, all_of(model), config_of(chunk_numel=1 << 20), capacities_of(unified=True))
    assert names(packing) == [[name for name, _ in model.named_parameters()]]
    for plan in packing.plans:
        for slot in plan.layout.slots:
            assert dict(model.named_parameters())[slot.name] is packing.parameters[slot.key]


def test_tied_parameters_have_one_slot_and_what_chunks_cannot_hold_has_none() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8).double())
    model[1].weight = model[0].weight
    assert list(managed_parameters(model)) == ["0.weight", "0.bias", "1.bias"]


def test_strides_that_are_dense_are_kept_and_others_are_not() -> None:
    model = nn.Module()
    conv = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    model.conv = nn.Parameter(conv)
    model.transposed = nn.Parameter(torch.randn(3, 5).t())
    model.gaps = nn.Parameter(torch.randn(4, 10)[:, ::2])
    model.expanded = nn.Parameter(torch.randn(1, 5).expand(4, 5))
    model.scalar = nn.Parameter(torch.tensor(1.0))
    model.empty = nn.Parameter(torch.empty(0, 3))
    packing = decide(model, all_of(model), config_of(), capacities_of(unified=True))
    strides = {slot.name: slot.stride for plan in packing.plans for slot in plan.layout.slots}
    assert strides == {
        "conv": conv.stride(), "transposed": (1, 5), "gaps": (5, 1), "expanded": (5, 1), "scalar": (), "empty": (3, 1)
    }  # fmt: skip


def test_a_model_without_parameters_makes_no_chunks() -> None:
    packing = decide(nn.ReLU(), [], GeminiConfig(), capacities_of(unified=True, host=0))
    assert packing.plans == () and packing.staging_block_numel == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_search_is_used_where_no_size_is_given(precision: str) -> None:
    model = mlp(width=256, depth=40)
    packing = decide(model, all_of(model), GeminiConfig(precision=precision), capacities_of(unified=True))
    assert len(packing.plans) >= 20
    assert all(plan.layout.numel <= packing.search.numel or len(plan.layout.slots) == 1 for plan in packing.plans)


def test_a_size_that_is_given_is_taken() -> None:
    model = mlp()
    packing = decide(model, all_of(model), config_of(chunk_numel=5000), capacities_of(unified=True))
    assert packing.search.numel == 5000
    assert all(plan.layout.slots[-1].stop <= 5000 for plan in packing.plans)


def test_where_the_best_size_makes_too_large_a_ring_smaller_chunks_are_taken() -> None:
    # The bias shares a chunk with what follows it: the unit needs its own large weight and that chunk.
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(400, 200), *(nn.Linear(64, 64) for _ in range(40)))
    room = int(400 * 200 * 2 * 1.1)
    packing = decide(model, all_of(model), GeminiConfig(max_prefetch=0), capacities_of(device=room))
    low, high = bounds([p.numel() for p in model.parameters()], room // 2)
    assert packing.search.numel < low
    check_room(model, packing, capacities_of(device=room))
    with pytest.raises(OutOfMemory):
        decide(model, all_of(model), GeminiConfig(max_prefetch=0, search_range=(low, high)), capacities_of(device=room))


# -- where it lives


def held(packing: Packing, tier: Tier, names: Sequence[str] = BUFFERS) -> int:
    unit = 4096 if tier is Tier.DISK else 1
    return sum(
        -(-plan.layout.numel * plan.specs[name].dtype.itemsize // unit) * unit
        for plan in packing.plans
        for name, home in plan.tiers.items()
        if home is tier and name in names
    )


def ring_bytes(model: nn.Module, packing: Packing) -> int:
    """The room for the unit that needs most, given which homes are full copies."""
    least = 0
    for module_name, module in model.named_modules():
        own = {f"{module_name}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
        chunks = [plan for plan in packing.plans if own & {slot.name for slot in plan.layout.slots}]
        streamed = 0
        for plan in chunks:
            in_reach = packing.memory.shares(plan.tiers[MASTER], Tier.DEVICE)
            if not (in_reach and plan.specs[MASTER].dtype is plan.compute_dtype):
                streamed += plan.layout.numel * plan.compute_dtype.itemsize
        least = max(least, streamed)
    return least


def check_room(model: nn.Module, packing: Packing, capacities: Capacities) -> None:
    staging = packing.staging_block_numel * 4 * (FETCH_WORKERS + BLOCK_SETS * len(BUFFERS))
    ring = ring_bytes(model, packing)
    nbytes = capacities.nbytes
    if capacities.memory is MemoryMap.UNIFIED:
        assert held(packing, Tier.DEVICE) == 0
        assert held(packing, Tier.HOST) + staging + ring <= nbytes[Tier.HOST]
    else:
        assert held(packing, Tier.DEVICE) + ring <= nbytes[Tier.DEVICE]
        assert held(packing, Tier.HOST) + staging <= nbytes[Tier.HOST]
    assert held(packing, Tier.DISK) <= nbytes[Tier.DISK]
    assert packing.staging_block_numel > 0 or not held(packing, Tier.DISK)


def test_with_room_for_all_on_one_ram_nothing_goes_to_disk() -> None:
    model = mlp()
    capacities = capacities_of(unified=True, disk=PLENTY)
    packing = decide(model, all_of(model), config_of(), capacities)
    assert held(packing, Tier.DISK) == 0
    check_room(model, packing, capacities)


def test_with_a_large_device_all_homes_are_there() -> None:
    model = mlp()
    capacities = capacities_of(device=PLENTY)
    packing = decide(model, all_of(model), config_of(), capacities)
    assert held(packing, Tier.HOST) == held(packing, Tier.DISK) == 0
    check_room(model, packing, capacities)


def test_in_fp32_a_device_as_large_as_the_homes_needs_no_ring() -> None:
    model = mlp()
    padded = sum(plan.layout.numel for plan in decide(model, all_of(model), config_of(), capacities_of(PLENTY)).plans)
    capacities = capacities_of(device=padded * 16, host=0)
    packing = decide(model, all_of(model), config_of(precision="fp32"), capacities)
    assert held(packing, Tier.DEVICE) == padded * 16


def test_a_static_policy_keeps_its_fraction_off_the_device() -> None:
    model = mlp()
    config = config_of(policy=StaticPlacementPolicy(offload_optim_frac=1.0))
    packing = decide(model, all_of(model), config, capacities_of(device=PLENTY))
    assert held(packing, Tier.DEVICE) == 0


@settings(deadline=None, max_examples=150)
@given(
    device=st.integers(0, 1 << 19),
    host=st.integers(0, 1 << 20),
    disk=st.just(0) | st.integers(1, 1 << 20),
    unified=st.booleans(),
    precision=st.sampled_from(["bf16", "fp32"]),
    chunk_numel=st.none() | st.sampled_from([100, 5000, 20000]),
    prefetch=st.integers(0, 3),
    frozen=st.booleans(),
)
def test_it_fits_with_ring_and_staging_or_the_message_says_what_is_enough(
    device: int,
    host: int,
    disk: int,
    unified: bool,
    precision: str,
    chunk_numel: int | None,
    prefetch: int,
    frozen: bool,
) -> None:
    model = mlp(width=48, depth=6)
    if frozen:
        model[2].requires_grad_(False)
    config = GeminiConfig(precision=precision, chunk_numel=chunk_numel, max_prefetch=prefetch)
    capacities = capacities_of(device, host, disk, unified)
    try:
        check_room(model, decide(model, all_of(model), config, capacities), capacities)
    except OutOfMemory as error:
        for remedy in remedies_of(str(error)):
            raised = with_capacities(capacities, remedy)
            check_room(model, decide(model, all_of(model), config, raised), raised)


def test_units_that_share_an_input_have_room_together_where_there_is_some() -> None:
    """Backward through query, key and value needs all three at once, and homes must not have taken that room."""
    with torch.device("meta"):
        model = nn.Module()
        model.attention = nn.Module()
        for name in ("query", "key", "value"):
            setattr(model.attention, name, nn.Linear(64, 64))
        model.rest = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))
    copy = (64 * 64 + 64) * 2
    for device in range(4 * copy, 40 * copy, copy // 3):
        packing = decide(
            model, all_of(model), config_of(chunk_numel=copy // 2, max_prefetch=0), capacities_of(device=device)
        )
        assert device - held(packing, Tier.DEVICE) >= 3 * copy
    tight = capacities_of(device=2 * copy, host=PLENTY)
    check_room(model, decide(model, all_of(model), config_of(chunk_numel=copy // 2), tight), tight)


# -- when it does not fit


def remedies_of(message: str) -> list[dict[Tier, int]]:
    """The alternatives that a message offers: bytes per tier, at least one."""
    offered = message.split("; ")[-1].split(", or ")
    found = [
        {Tier(tier): int(nbytes) for tier, nbytes in re.findall(r"(\w+)_memory to (\d+) bytes", offer)}
        for offer in offered
    ]
    remedies = [remedy for remedy in found if remedy]
    assert remedies, message
    return remedies


def with_capacities(capacities: Capacities, nbytes: Mapping[Tier, int]) -> Capacities:
    told = {**capacities.budgets, **{tier: Budget(n, "as told") for tier, n in nbytes.items()}}
    budgets = {tier: told[capacities.memory.pool(tier)] for tier in Tier}
    return replace(capacities, budgets=budgets)


def message_of(model: nn.Module, config: GeminiConfig, capacities: Capacities) -> str:
    with pytest.raises(OutOfMemory) as raised:
        decide(model, all_of(model), config, capacities)
    return str(raised.value)


def test_too_little_ram_without_a_disk_offers_a_folder_or_more_ram() -> None:
    model = mlp(256, 8)
    message = message_of(model, GeminiConfig(), capacities_of(host=1 << 20, unified=True))
    assert message.startswith("all tiers out of memory. The model data need 7.0 MiB and room to work")
    assert "host 1.0 MiB (test host)" in message and "disk 0 B (test disk)" in message and "device" not in message
    assert "GeminiPlugin(offload_dir=...)" in message
    remedies = remedies_of(message)
    assert [set(remedy) for remedy in remedies] == [{Tier.DISK}, {Tier.HOST}]


def test_too_small_a_disk_offers_more_disk_or_more_ram() -> None:
    message = message_of(mlp(256, 8), GeminiConfig(), capacities_of(host=1 << 20, disk=1 << 20, unified=True))
    assert "offload_dir" not in message
    assert [set(remedy) for remedy in remedies_of(message)] == [{Tier.DISK}, {Tier.HOST}]


def test_a_unit_larger_than_the_device_is_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1024), nn.Linear(1024, 16)).to("meta")
    message = message_of(model, config_of(chunk_numel=1024), capacities_of(device=10_000))
    assert message.startswith("device tier out of memory. Unit '1' alone needs 34.0 KiB of parameters at once")
    assert "device 9.8 KiB (test device)" in message and "chunk_config_dict" in message
    assert all(set(remedy) == {Tier.DEVICE} for remedy in remedies_of(message))


def test_a_model_that_is_one_unit_larger_than_the_device_is_called_the_model() -> None:
    message = message_of(nn.Linear(64, 64, device="meta"), config_of(chunk_numel=1024), capacities_of(device=1000))
    assert message.startswith("device tier out of memory. The model, which is one unit, alone needs")


def test_a_unit_larger_than_the_ram_is_named() -> None:
    message = message_of(mlp(256, 2), config_of(), capacities_of(host=100_000, disk=PLENTY, unified=True))
    assert message.startswith("host tier out of memory. Unit '0' alone needs")


def test_on_this_machine_the_message_is_true_too(tmp_path: Path) -> None:
    model = mlp(256, 8)
    config = GeminiConfig(host_memory=1 << 20, device_memory=1 << 20)
    message = message_of(model, config, find_capacities(config))
    assert "argument host_memory" in message and "argument device_memory" in message
    for remedy in remedies_of(message):
        options: dict[str, Any] = {f"{tier.value}_memory": nbytes for tier, nbytes in remedy.items()}
        if Tier.DISK in remedy:
            options["offload_dir"] = tmp_path
        told = replace(config, **options)
        decide(model, all_of(model), told, find_capacities(told))
