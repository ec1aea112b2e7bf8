"""Several models in one budget: they share it, idle ones make room, and numbers are those of each alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from collected import collect_all
from loop import SMALL, batch
from parity import check_at_rest, masters
from torch import Tensor, nn

import gemini
from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.lease import part
from gemini.lease.folder import LeaseFolder
from gemini.nn.optimizer import HybridAdam

WIDTH = 64
ROLES = ("actor", "critic", "reference", "reward")
TRAINED = ("actor", "critic")


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect_all()  # models of other tests, which share the process's budget
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(part, "LOOK_SECONDS", 0.0)


def build(seed: int, out: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, out))


class Four:
    """Actor, critic, reference and reward model, as they take turns in reinforcement learning."""

    def __init__(self, precision: str, plugin: dict[str, Any] | None) -> None:
        self.models: dict[str, Any] = {}
        self.optimizers: dict[str, Any] = {}
        self.boosters: dict[str, Booster] = {}
        for seed, role in enumerate(ROLES):
            model: Any = build(seed, out=8 if role in ("actor", "reference") else 1)
            optimizer: Any = HybridAdam(model.parameters(), lr=1e-2) if role in TRAINED else None
            if plugin is not None:
                booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **plugin))
                model, optimizer, *_ = booster.boost(model, optimizer)
                self.boosters[role] = booster
            self.models[role], self.optimizers[role] = model, optimizer

    def turn(self, number: int) -> list[float]:
        """Roll out, look at it from three sides, and train the two that learn."""
        x = batch(number, rows=8)
        with torch.no_grad():
            rollout = self.models["actor"](x)
            expected = self.models["reference"](x)
            reward = self.models["reward"](x)
            value = self.models["critic"](x)
        advantage = reward - value
        found = []
        for role in TRAINED:
            out = self.models[role](x)
            if role == "actor":
                loss = (out * advantage).mean() + (out - expected).square().mean() + 0 * rollout.mean()
            else:
                loss = (out - reward).square().mean()
            self.backward(role, loss)
            self.optimizers[role].step()
            self.optimizers[role].zero_grad()
            found.append(loss.item())
        return found

    def backward(self, role: str, loss: Tensor) -> None:
        if role in self.boosters:
            self.boosters[role].backward(loss, self.optimizers[role])
        else:
            loss.backward()

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for role, model in self.models.items():
            check_at_rest(model)
            found |= {f"{role}.{name}": value for name, value in masters(model).items()}
        return found

    def used(self, tier: Tier = Tier.HOST) -> int:
        return sum(boosted(model).manager.ledger.used(tier) for model in self.models.values())

    def capacity(self) -> int:
        return sum(boosted(model).manager.ledger.capacity(Tier.HOST) for model in self.models.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_four_models_take_turns_in_a_budget_that_does_not_hold_them(precision: str) -> None:
    apart = Four(precision, {"host_memory": "8MiB", "offload_dir": "disk", **SMALL})
    need = apart.used()
    budget = gemini.Budget(host_memory=need // 2)
    together = Four(precision, {"budget": budget, "offload_dir": "disk", **SMALL})
    assert together.used(Tier.DISK) > 0
    for number in range(4):
        assert together.turn(number) == apart.turn(number)
        assert together.capacity() <= need // 2
    theirs = apart.weights()
    assert not [name for name, value in together.weights().items() if not torch.equal(value, theirs[name])]


def test_a_budget_holds_one_lease_for_all_of_its_models() -> None:
    budget = gemini.Budget(host_memory="4MiB")
    four = Four("fp32", {"budget": budget, "offload_dir": "disk", **SMALL})
    (standing,) = LeaseFolder().standings().values()
    assert standing.holdings["host"].floor >= 4 << 20
    del four
    collect_all()
    assert LeaseFolder().standings() == {}


def test_homes_of_a_model_that_idles_leave_for_one_that_is_boosted_and_come_back_when_it_is_gone() -> None:
    plain, first = Single(None), Single({"host_memory": "8MiB", "offload_dir": "disk", **SMALL})
    need = boosted(first.model).manager.ledger.used(Tier.HOST)
    budget = gemini.Budget(host_memory=need * 5 // 4)
    teacher = Single({"budget": budget, "offload_dir": "disk", **SMALL})
    assert boosted(teacher.model).manager.ledger.used(Tier.DISK) == 0
    student = Single({"budget": budget, "offload_dir": "disk", **SMALL})
    assert boosted(teacher.model).manager.ledger.used(Tier.DISK) > 0
    for number in range(2):
        losses = [each.step(number) for each in (plain, teacher, student)]
        assert losses == losses[:1] * 3
    del student
    collect_all()
    for number in range(2, 4):
        assert teacher.step(number) == plain.step(number)
    assert boosted(teacher.model).manager.ledger.used(Tier.DISK) == 0


class Single:
    """One model that trains."""

    def __init__(self, plugin: dict[str, Any] | None) -> None:
        self.model: Any = build(0, 8)
        self.optimizer: Any = HybridAdam(self.model.parameters(), lr=1e-2)
        if plugin is not None:
            booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **plugin))
            self.model, self.optimizer, *_ = booster.boost(self.model, self.optimizer)

    def step(self, number: int) -> float:
        loss = self.model(batch(number)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def test_a_model_may_be_given_more_within_its_budget_and_not_beyond() -> None:
    budget = gemini.Budget(host_memory="2MiB")
    ours = Single({"budget": budget, "offload_dir": "disk", **SMALL})
    booster = Booster(plugin=GeminiPlugin(budget=budget))
    booster.resize(ours.model, host_memory="1MiB")
    with pytest.raises(ValueError, match=r"more than the model's budget has, 2\.0 MiB"):
        booster.resize(ours.model, host_memory="3MiB")
    ours.step(0)


def test_what_is_no_budget_is_refused() -> None:
    with pytest.raises(TypeError, match=r"budget must be None or a gemini\.Budget, got 8589934592 of type int"):
        GeminiPlugin(budget=8 << 30)  # type: ignore[arg-type]


def test_models_of_an_emulated_device_share_it() -> None:
    plain = Single(None)
    budget = gemini.Budget(device_memory="80KiB", host_memory="8MiB")
    pair = [Single({"budget": budget, **SMALL}) for _ in range(2)]
    devices = [boosted(each.model).manager.ledger for each in pair]
    for number in range(3):
        losses = [each.step(number) for each in (plain, *pair)]
        assert losses == losses[:1] * 3
        assert sum(ledger.capacity(Tier.DEVICE) for ledger in devices) <= 80 << 10
