"""What ranks need that keep a model together, estimated and as they have it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from loop import SMALL, batch, build
from torch import nn
from two_owners import Owners

from gemini.boosted import boosted
from gemini.chunk import MemoryMap, Tier
from gemini.config import GeminiConfig
from gemini.estimate.demand import FirstOf, Machine, ModelData, demand, model_bytes
from gemini.estimate.recorded import packs
from gemini.estimate.solve import solve_ranks
from gemini.estimate.subject import Subject, find_subject
from gemini.memory.tracker import host_budget
from gemini.monitor.decided import Decided
from gemini.nn.optimizer import HybridAdam
from gemini.stat.cli import main
from gemini.stat.commands.schema import output_schema

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
GPT2 = ["gpt2", "--set", "n_embd=64", "--set", "n_head=4", "--set", "n_layer=5", "--set", "vocab_size=256"]
Capture = pytest.CaptureFixture[str]

PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "160KiB", **SMALL},
    "disk": {"host_memory": "1000KiB", "offload_dir": "disk", **SMALL},
}


def subject() -> Subject:
    return Subject("test", build, lambda size, length: {"input": torch.zeros(size, 64)})


def owners_of(count: int, **plugin: Any) -> Owners:
    def made() -> tuple[nn.Module, HybridAdam]:
        model = build()
        return model, HybridAdam(model.parameters(), lr=1e-3)

    return Owners(count, made, lambda model, number: model(batch(number)).float().square().mean(), **plugin)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("precision", "count"), [("fp32", 2), ("bf16", 3)])
@pytest.mark.parametrize("place", PLACES)
def test_each_rank_needs_what_the_estimate_says(
    place: str, precision: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    owners = owners_of(count, precision=precision, **PLACES[place])
    owners.train(3, count)
    for model in owners.models:
        state, stats = boosted(model), model.memory_stats()
        limits, memory = state.capacities.nbytes, state.capacities.memory
        data = ModelData(subject(), replace(state.config, communicator=GeminiConfig().communicator))
        packing = data.pack(limits, memory, count)
        assert packing.placement == state.packing.placement
        expected = model_bytes(packing, limits)
        for tier in Tier:
            slack = max(chunk.full_nbytes for chunk in state.manager.chunks)
            # The first rank's extents are the largest, and the others need no more.
            assert stats[f"{tier.value}/peak_bytes"] <= expected[tier] + slack, tier
        homes = dict.fromkeys(Tier, 0)
        for plan in packing.plans:
            for name, tier in plan.tiers.items():
                homes[tier] += plan.nbytes(name)
        kept = {
            tier: sum(h.nbytes for c in state.manager.chunks for h in c.homes.values() if h.tier is tier)
            for tier in Tier
        }
        gradients = [c.gradient.buffer for c in state.manager.chunks if c.gradient is not None]
        for buffer in gradients:
            assert buffer is not None
            kept[buffer.tier] += buffer.nbytes
        if model is owners.models[0]:
            assert kept == homes
        else:
            assert all(kept[tier] <= homes[tier] for tier in Tier)


def test_the_homes_of_many_ranks_are_a_part_of_those_of_one() -> None:
    data = ModelData(find_subject("gpt2", {"n_embd": 256, "n_head": 4, "n_layer": 4}), GeminiConfig())
    limits = dict.fromkeys(Tier, 1 << 34)

    def homes(ranks: int) -> int:
        packing = data.pack(limits, MemoryMap.ACCELERATOR, ranks)
        return sum(plan.nbytes(name) for plan in packing.plans for name in plan.tiers)

    alone = homes(1)
    for ranks in (2, 4, 8):
        assert alone / ranks <= homes(ranks) <= 1.01 * alone / ranks


def test_ranks_of_a_machine_share_its_ram_and_are_shown_together(capsys: Capture) -> None:
    arguments = ["estimate", *GPT2, "--ram", "192MiB", "-b", "2", "-s", "32", "--ranks", "6", "--per-node", "4"]
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    schema = output_schema()
    jsonschema.Draft202012Validator({"$ref": "#/$defs/estimate", "$defs": schema["$defs"]}).validate(content)
    assert (content["ranks"], content["ranks_per_node"], content["nodes"]) == (6, 4, 2)
    rank, node = content["tiers"]["host"], content["node_tiers"]["host"]
    assert rank["capacity_bytes"] == 48 * MIB
    assert {key: 4 * rank[key] for key in rank if key != "fits"} == {key: node[key] for key in node if key != "fits"}
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for expected in ("6 ranks on 2 machines, up to 4 on each", "each rank", "a machine", "of each rank: masters"):
        assert expected in out


def test_one_process_is_shown_without_ranks(capsys: Capture) -> None:
    assert main(["estimate", *GPT2, "--ram", "192MiB"]) == 0
    assert "rank" not in capsys.readouterr().out
    assert main(["estimate", *GPT2, "--ram", "192MiB", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["ranks"], content["ranks_per_node"], content["nodes"]) == (1, 1, 1)
    assert content["tiers"] == content["node_tiers"]


def test_the_fewest_ranks_are_found(capsys: Capture) -> None:
    data = ModelData(
        find_subject("gpt2", {"n_embd": 128, "n_head": 4, "n_layer": 8, "vocab_size": 256}), GeminiConfig()
    )

    def machine_of(ranks: int) -> Machine:
        return Machine(device_bytes=None, ram_bytes=36 * MIB, disk_bytes=0, ranks=ranks)

    fewest = solve_ranks(data, 2 * MIB, machine_of)
    assert fewest is not None and fewest > 1
    assert demand(data, 2 * MIB, machine_of(fewest)).fits
    assert not demand(data, 2 * MIB, machine_of(fewest - 1)).fits
    assert solve_ranks(data, 2 * MIB, lambda ranks: Machine(device_bytes=None, ram_bytes=MIB, disk_bytes=0)) is None
    model = ["gpt2", "--set", "n_embd=128", "--set", "n_head=4", "--set", "n_layer=8", "--set", "vocab_size=256"]
    given = ["--ram", "36MiB", "-s", "32", "--solve", "ranks", "--per-node", "1", "--json"]
    assert main(["estimate", *model, *given]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["solved"]["value"] == content["ranks"] == content["nodes"] > 1
    assert content["fits"]


def test_least_memory_is_told_for_a_machine(capsys: Capture) -> None:
    arguments = ["estimate", *GPT2, "--ram", "1GiB", "-s", "32", "--ranks", "4", "--solve", "host"]
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    least = content["solved"]["value"]
    assert content["node_tiers"]["host"]["capacity_bytes"] == least
    given = ["estimate", *GPT2, "-s", "32", "--ranks", "4", "--ram"]
    assert main([*given, str(least)]) == 0
    assert main([*given, str(least - 4 * MIB)]) == 3


def test_ram_that_is_found_is_divided_by_the_ranks_of_a_machine() -> None:
    whole, part = host_budget(0.5, ranks=1), host_budget(0.5, ranks=4)
    assert abs(part.bytes - whole.bytes // 4) < whole.bytes // 20  # other processes come and go
    assert "shared by 4 local ranks" in part.source or "RLIMIT" in part.source


def test_what_a_rank_has_recorded_is_packed_again_as_a_part(tmp_path: Path) -> None:
    owners = owners_of(3, precision="bf16", **SMALL)
    owners.train(1, 3)
    for model in owners.models:
        state = boosted(model)
        document = Decided.of(model, state.config, state.capacities).document(state.manager, state.packing, [])
        assert document.config["owners"] == 3
        limits = dict.fromkeys(Tier, 0)
        expected = model_bytes(
            ModelData(subject(), replace(state.config, communicator=FirstOf(3))).pack(
                state.capacities.nbytes, MemoryMap.UNIFIED
            ),
            state.capacities.nbytes,
        )
        enough = {**limits, Tier.HOST: expected[Tier.HOST], Tier.DEVICE: expected[Tier.HOST]}
        assert packs(document, enough)
        assert not packs(document, {tier: nbytes // 4 for tier, nbytes in enough.items()})
