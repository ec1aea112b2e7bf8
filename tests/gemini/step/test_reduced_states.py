"""Moments in bfloat16 and 8 bits under management: the unmanaged numbers, wherever they are, in fewer bytes."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Task, check_equal, check_parity, run_managed, run_plain
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MemoryMap, Tier
from gemini.config import GeminiConfig
from gemini.errors import OutOfMemory
from gemini.estimate.demand import ModelData
from gemini.estimate.subject import Subject
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.kernels import reference, update
from gemini.nn.optimizer.kernels.reduced import BLOCK_NUMEL
from gemini.nn.optimizer.rules.moments import slots
from gemini.packing import solve
from gemini.planning.placement import Placement, place
from gemini.stat import cli

REDUCED = ["bf16", "8bit"]
BYTES = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 8 / BLOCK_NUMEL}


class Odd(nn.Module):
    """Lengths that are no multiples of a block, a convolution in channels_last, a parameter that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)
        self.first, self.second = nn.Linear(7, 1031), nn.Linear(1031, 97, bias=False)
        self.rare, self.last = nn.Linear(97, 97), nn.Linear(97, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.second(self.first(self.conv(x).flatten(2).mean(2)).tanh())
        return self.last(h + self.rare(h) if float(x.flatten()[0]) > 0 else h)


def batches(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def task(states: str, precision: str = "fp32") -> Task:
    return Task(Odd, batches(), loss, precision, states=states)


def size(numel: int) -> dict[str, Any]:
    return {"chunk_config_dict": {1: {"chunk_size": numel}}}


PLACEMENTS: dict[str, dict[str, Any]] = {
    "everything resident": {},
    "small chunks": size(1 << 12),
    "one large chunk": size(1 << 18),
    "an emulated device": {"device_memory": "64MiB"},
    "half on an emulated device": {"device_memory": "1MiB", **size(1 << 13)},
    "disk": {"host_memory": "800KiB", "offload_dir": None, **size(1 << 14)},
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("states", REDUCED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_gives_the_numbers_of_the_unmanaged_model(
    states: str, precision: str, placement: str, tmp_path: Path
) -> None:
    arguments = dict(PLACEMENTS[placement])
    if "offload_dir" in arguments:
        arguments["offload_dir"] = tmp_path
    # Lazy models in fp32 only: in bf16 their masters start from values that the unmanaged model rounds.
    model = check_parity(task(states, precision), lazy=precision == "fp32", **arguments)
    if placement == "disk":
        assert "exp_avg_sq" in buffers_on_disk(model)


def buffers_on_disk(model: nn.Module) -> set[str]:
    chunks = boosted(model).manager.chunks
    return {name for chunk in chunks for name, home in chunk.homes.items() if home.tier is Tier.DISK}


def test_scales_on_disk_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place_scales_on_disk(*args: Any) -> Placement:
        found = place(*args)
        assert isinstance(found, Placement)
        scales = ("exp_avg_scale", "exp_avg_sq_scale")
        homes = tuple({name: Tier.DISK if name in scales else tier for name, tier in h.items()} for h in found.homes)
        nbytes = {**found.nbytes, Tier.DISK: found.nbytes[Tier.DISK] + (1 << 20)}
        return replace(found, homes=homes, nbytes=nbytes)

    monkeypatch.setattr(solve, "place", place_scales_on_disk)
    _, model = run_managed(task("8bit"), offload_dir=tmp_path, **size(1 << 14))
    assert buffers_on_disk(model) == {"exp_avg_scale", "exp_avg_sq_scale"}
    check_equal(run_managed(task("8bit"), offload_dir=tmp_path, **size(1 << 14))[0], run_plain(task("8bit")))


@pytest.mark.parametrize("states", REDUCED)
def test_without_a_compiler_updates_in_slices_give_the_same_numbers(
    states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_plain(task(states))
    monkeypatch.setattr(update, "KERNELS", {("cpu", form): kernel for form, kernel in reference.BY_FORM.items()})
    monkeypatch.setattr(update, "SLICE_NUMEL", 2 * BLOCK_NUMEL)
    check_equal(run_managed(task(states), **size(1 << 14))[0], expected)


@pytest.mark.parametrize("states", ["fp32", *REDUCED])
def test_statistics_placement_and_estimate_say_the_bytes(states: str) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))

    one = Task(build, [torch.randn(2, 512)], lambda model, x: model(x).square().mean(), states=states)
    _, model = run_managed(one)
    numel = 2 * 512 * 512
    stats = model.memory_stats()  # type: ignore[operator]
    assert stats["model_data/optimizer_bytes"] == BYTES[states] * numel
    assert boosted(model).packing.placement.nbytes[Tier.HOST] == (4 + 4 + BYTES[states]) * numel
    data = ModelData(
        Subject("two layers", build, lambda size, length: {}), GeminiConfig(precision="fp32"), slots(states)
    )
    packing = data.pack({Tier.DEVICE: 1, Tier.HOST: 1 << 30, Tier.DISK: 0}, MemoryMap.UNIFIED)
    assert packing.placement.nbytes == boosted(model).packing.placement.nbytes


def test_the_estimate_command_takes_reduced_states(capsys: pytest.CaptureFixture[str]) -> None:
    moments = {}
    for states in BYTES:
        command = ["estimate", "gpt2", "--set", "n_layer=1", "--set", "n_embd=64", "--set", "n_head=2"]
        cli.main([*command, "--ram", "8GiB", "--optimizer", "HybridAdam", f"states={states}", "--json"])
        moments[states] = json.loads(capsys.readouterr().out)["terms"]["moments"]
    assert moments["fp32"] == pytest.approx(2 * moments["bf16"], rel=0.001)
    assert moments["8bit"] < 0.52 * moments["bf16"]


def test_reduced_states_fit_where_float32_does_not() -> None:
    def attempt(states: str) -> nn.Module:
        return run_managed(task(states), host_memory="1650KiB", **size(1 << 13))[1]

    with pytest.raises(OutOfMemory):
        attempt("fp32")
    for states in REDUCED:
        attempt(states)


# -- checkpoints


class Trainer:
    """A model and its optimizer, boosted or not, that goes on where it is."""

    def __init__(self, states: str, managed: bool, **plugin: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = Odd()
        self.optimizer: Any = HybridAdam(self.model.parameters(), lr=1e-2, weight_decay=0.1, states=states)
        self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **plugin) if managed else None)
        self.managed = managed
        if managed:
            self.boost()

    def boost(self) -> None:
        self.model, self.optimizer, *_ = self.booster.boost(self.model, self.optimizer)

    def train(self, steps: range) -> "Trainer":
        for i in steps:
            value = loss(self.model, batches(10)[i])
            if self.managed:
                self.booster.backward(value, self.optimizer)
            else:
                value.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def check_same(a: Trainer, b: Trainer) -> None:
    ours, theirs = a.weights(), b.weights()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("states", REDUCED)
@pytest.mark.parametrize("file", ["folder", "optimizer.pt"])
def test_a_checkpoint_of_a_boosted_optimizer_goes_on_bit_for_bit(states: str, file: str, tmp_path: Path) -> None:
    straight = Trainer(states, True).train(range(8))
    saving = Trainer(states, True).train(range(4))
    saving.booster.save_model(saving.model, tmp_path / "model", shard=True)
    saving.booster.save_optimizer(saving.optimizer, tmp_path / file, shard=file == "folder")
    loading = Trainer(states, True, **size(1 << 12)).train(range(1))
    loading.booster.load_model(loading.model, tmp_path / "model")
    loading.booster.load_optimizer(loading.optimizer, tmp_path / file)
    check_same(loading.train(range(4, 8)), straight)


@pytest.mark.parametrize("states", REDUCED)
def test_states_go_over_to_the_unmanaged_optimizer_and_back(states: str) -> None:
    straight = Trainer(states, False).train(range(9))
    moved = Trainer(states, False).train(range(3))
    moved.booster, moved.managed = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False)), True
    moved.boost()
    moved.train(range(3, 6))
    again = Trainer(states, False)
    again.model.load_state_dict(moved.weights())
    again.optimizer.load_state_dict(moved.optimizer.state_dict())
    check_same(again.train(range(6, 9)), straight)
    check_same(moved.train(range(6, 9)), straight)


def test_a_state_dict_of_float32_moments_loads_into_8_bits_and_one_of_torch_too() -> None:
    full = Trainer("fp32", False).train(range(4))
    reduced = Trainer("8bit", True)
    theirs = torch.optim.AdamW(Odd().parameters())
    theirs.load_state_dict(full.optimizer.state_dict())
    for saved in (full.optimizer.state_dict(), theirs.state_dict()):
        reduced.optimizer.load_state_dict(saved)
        loaded = reduced.optimizer.state_dict()["state"]
        assert set(loaded) == set(saved["state"])
        for a, b in ((loaded[index], state) for index, state in saved["state"].items()):
            assert a["exp_avg_sq"].dtype == torch.float32
            assert (a["exp_avg_sq"] - b["exp_avg_sq"]).abs().max() <= b["exp_avg_sq"].max() * 2**-4
            assert not torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_the_rest_of_a_model_may_be_in_no_chunk() -> None:
    # A parameter of the optimizer that is not the model's stays plain, and is kept and saved in the same way.
    outside = nn.Parameter(torch.ones(300))
    model: Any = Odd()
    optimizer: Any = HybridAdam([*model.parameters(), outside], states="8bit")
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, optimizer)

    def step() -> None:
        booster.backward(loss(model, batches(1)[0]) + outside.square().sum(), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][max(saved["state"])]["exp_avg"].dtype == torch.float32
    before = outside.detach().clone()
    step()
    after = outside.detach().clone()
    optimizer.load_state_dict(saved)
    assert optimizer.state[outside]["exp_avg"].dtype == torch.uint8
    with torch.no_grad():
        outside.copy_(before)
    outside.grad = 2 * before
    optimizer.step()
    assert torch.equal(outside.detach(), after)
