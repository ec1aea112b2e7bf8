"""Optimizer and scheduler states: boosted, on their own, and torch's."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_same, boost, gpt2, mixed, train, values
from torch import nn
from torch.optim import lr_scheduler

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.checkpoint import load_lr_scheduler, load_optimizer, save_lr_scheduler, save_optimizer
from gemini.errors import CheckpointError
from gemini.nn.optimizer import HybridAdam

FORMS = ["folder", "optimizer.pt"]


def assert_same_state(found: dict, expected: dict) -> None:
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert_same({name: found["state"][index][name] for name in state}, state)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("form", FORMS)
def test_torchs_adamw_goes_on_with_the_state_of_a_boosted_optimizer(tmp_path: Path, form: str) -> None:
    booster, model, optimizer = boost(gpt2())
    train(booster, model, optimizer, range(2))
    booster.save_optimizer(optimizer, tmp_path / form)
    other = torch.optim.AdamW(gpt2().parameters())
    if form == "folder":
        load_optimizer(other, tmp_path / form)
    else:
        other.load_state_dict(torch.load(tmp_path / form, weights_only=True))
    assert other.param_groups[0]["lr"] == 1e-2
    expected = optimizer.state_dict()["state"]
    for index, state in other.state_dict()["state"].items():
        assert_same(state, expected[index])


def test_a_boosted_optimizer_goes_on_with_the_state_of_torchs_adamw(tmp_path: Path) -> None:
    model = gpt2()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.5)
    stepped(model, theirs)
    torch.save(theirs.state_dict(), tmp_path / "theirs.bin")
    booster, _, optimizer = boost(gpt2())
    booster.load_optimizer(optimizer, tmp_path / "theirs.bin")
    found = optimizer.state_dict()
    assert found["param_groups"][0]["lr"] == 0.5
    for index, state in theirs.state_dict()["state"].items():
        assert_same({name: found["state"][index][name] for name in state}, state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_optimizer_of_its_own_is_restored_with_its_masters(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    model = nn.Linear(5, 3).to(dtype)
    optimizer = HybridAdam(model.parameters(), lr=1e-2)
    stepped(model, optimizer)
    save_optimizer(optimizer, tmp_path / form)
    other = HybridAdam(nn.Linear(5, 3).to(dtype).parameters())
    load_optimizer(other, tmp_path / form)
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert ("master" in other.state_dict()["state"][0]) == (dtype == torch.bfloat16)


def test_masters_of_an_optimizer_of_its_own_become_those_of_a_boosted_model(tmp_path: Path) -> None:
    model = nn.Linear(64, 32, bias=False).bfloat16()
    optimizer = HybridAdam(model.parameters(), lr=1e-2)
    stepped(model, optimizer)
    save_optimizer(optimizer, tmp_path)
    booster, boosted, other = boost(nn.Linear(64, 32, bias=False), "bf16")
    booster.load_optimizer(other, tmp_path)
    assert torch.equal(boosted.state_dict()["weight"], optimizer.state_dict()["state"][0]["master"])


def test_parameters_are_found_by_name_in_another_order(tmp_path: Path) -> None:
    booster, model, optimizer = boost(gpt2())
    train(booster, model, optimizer, range(2))
    booster.save_optimizer(optimizer, tmp_path)
    other = gpt2()
    reverse = HybridAdam(list(other.parameters())[::-1])
    other_booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    other_booster.boost(other, reverse)
    other_booster.load_optimizer(reverse, tmp_path)
    count = len(list(other.parameters()))
    found, expected = reverse.state_dict()["state"], optimizer.state_dict()["state"]
    for index in range(count):
        assert_same(found[count - 1 - index], expected[index])


def test_parameters_that_had_not_stepped_lose_what_they_have(tmp_path: Path) -> None:
    booster, model, optimizer = boost(gpt2())
    for form in FORMS:
        booster.save_optimizer(optimizer, tmp_path / form)
    for form in FORMS:
        before = values(model)
        first = train(booster, model, optimizer, range(2))
        booster.load_optimizer(optimizer, tmp_path / form)
        assert optimizer.state_dict()["state"] == {}
        model.load_state_dict(before)
        assert train(booster, model, optimizer, range(2)) == first
        booster.load_optimizer(optimizer, tmp_path / form)
        model.load_state_dict(before)


def test_groups_ties_frozen_and_wide_parameters_are_kept_apart(tmp_path: Path) -> None:
    def build():
        model = mixed()
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trainable[:3], "lr": 0.1, "name": "slow"}, {"params": trainable[3:], "betas": (0.5, 0.75)}]
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
        return booster, *booster.boost(model, HybridAdam(groups))[:2]

    booster, model, optimizer = build()
    for _ in range(2):
        booster.backward(model(torch.ones(2, 3, 8, 8)), optimizer)
        optimizer.step()
    for form in FORMS:
        booster.save_optimizer(optimizer, tmp_path / form)
        other_booster, _, other = build()
        other_booster.load_optimizer(other, tmp_path / form)
        assert_same_state(other.state_dict(), optimizer.state_dict())
        assert other.param_groups[0]["name"] == "slow"
        assert other.param_groups[1]["betas"] == (0.5, 0.75)


def test_states_of_parameters_that_are_frozen_when_they_are_loaded_come_back_when_these_train(tmp_path: Path) -> None:
    def build(frozen: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].requires_grad_(not frozen)
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
        return booster, *booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))[:2]

    def step(booster, model, optimizer):
        booster.backward(model(torch.ones(2, 8)).square().sum(), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    booster, model, optimizer = build(frozen=False)
    step(booster, model, optimizer)
    booster.save(tmp_path, model=model, optimizer=optimizer)
    other_booster, other_model, other = build(frozen=True)
    other_booster.load(tmp_path, model=other_model, optimizer=other)
    assert_same_state(other.state_dict(), optimizer.state_dict())
    other_model[0].requires_grad_(True)
    for each in ((booster, model, optimizer), (other_booster, other_model, other)):
        step(*each)
    assert all(torch.equal(value, other_model.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_folder_holds_plain_json_with_names(tmp_path: Path) -> None:
    booster, model, optimizer = boost(gpt2())
    train(booster, model, optimizer, range(1))
    booster.save_optimizer(optimizer, tmp_path, prefix="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.optimizer.json", "a.optimizer.safetensors"]
    content = json.loads((tmp_path / "a.optimizer.json").read_text())
    (group,) = content["param_groups"]
    assert group["param_names"] == [name for name, _ in gpt2().named_parameters()]
    assert content["weight_map"]["0.exp_avg"] == "a.optimizer.safetensors"
    booster.load_optimizer(optimizer, tmp_path)


def test_an_option_that_is_no_plain_value_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    optimizer = HybridAdam([{"params": nn.Linear(2, 2).parameters(), "callback": print}])
    with pytest.raises(CheckpointError, match="'callback' of a parameter group is a builtin_function_or_method"):
        save_optimizer(optimizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_state_of_other_shapes_changes_nothing(tmp_path: Path, form: str) -> None:
    booster, model, optimizer = boost(gpt2(n_embd=16))
    train(booster, model, optimizer, range(1))
    booster.save_optimizer(optimizer, tmp_path / form)
    booster, model, optimizer = boost(gpt2())
    train(booster, model, optimizer, range(1))
    before = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"exp_avg of parameter 0: saved \(96, 16\), expected \(96, 32\)"):
        booster.load_optimizer(optimizer, tmp_path / form)
    assert_same_state(optimizer.state_dict(), before)


def test_mistakes_in_arguments_are_clear(tmp_path: Path) -> None:
    _, model, optimizer = boost(mixed())
    with pytest.raises(ValueError, match=r"to a folder, or to one \.pt"):
        save_optimizer(optimizer, tmp_path / "x.pt", shard=True)
    with pytest.raises(TypeError, match=r"only a HybridAdam, or what booster\.boost returned, .* got SGD"):
        save_optimizer(torch.optim.SGD(model.parameters()), tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_optimizer(optimizer, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        load_optimizer(optimizer, tmp_path)


SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=9),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=9),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    def build():
        model = nn.Linear(2, 2)
        optimizer = HybridAdam(model.parameters(), lr=0.3)
        return model, optimizer, SCHEDULERS[kind](optimizer)

    def rates(model, optimizer, scheduler, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            stepped(model, optimizer, 1)
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    model, optimizer, scheduler = build()
    rates(model, optimizer, scheduler, 3)
    save_lr_scheduler(scheduler, tmp_path / "scheduler")
    save_optimizer(optimizer, tmp_path / "optimizer")
    expected = rates(model, optimizer, scheduler, 3)
    model, optimizer, scheduler = build()
    load_optimizer(optimizer, tmp_path / "optimizer")
    load_lr_scheduler(scheduler, tmp_path / "scheduler")
    assert rates(model, optimizer, scheduler, 3) == expected


class Warmup:
    """A callable object; a LambdaLR saves its attributes."""

    def __init__(self) -> None:
        self.shape = math.sin

    def __call__(self, step: int) -> float:
        return 1.0


def test_a_scheduler_that_would_not_load_again_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    scheduler = lr_scheduler.LambdaLR(HybridAdam(nn.Linear(2, 2).parameters()), Warmup())
    with pytest.raises(CheckpointError, match=r"the state of LambdaLR\[.* only tensors, numbers, texts"):
        save_lr_scheduler(scheduler, tmp_path / "scheduler")
    torch.save({"a": 1}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not the state of a LambdaLR"):
        load_lr_scheduler(scheduler, tmp_path / "other")
