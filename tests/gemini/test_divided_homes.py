"""Homes of which RAM has the first part and the disk the rest: the numbers of plain PyTorch, whatever is done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from divided_homes import ROOM, divide_everything, divided_buffers
from loop import check_same
from other_optimizers import Other
from other_optimizers import build as build_large
from parity import Task, check_equal, check_parity, run_managed, run_plain
from torch import Tensor, nn
from two_owners import Owners, check_owners

import gemini
from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import GRADIENT, MASTER, Tier
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.timeout(120)

MOMENTS = {"exp_avg", "exp_avg_sq"}
LEAST = 2_400_000
"""Bytes of RAM that `Odd` needs for full copies and staging."""


class Odd(nn.Module):
    """Lengths that are no multiples of a block, a parameter that is not always used, and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(61, 97)
        self.first, self.second = nn.Linear(97, 1031), nn.Linear(1031, 97, bias=False)
        self.rare, self.last = nn.Linear(97, 97), nn.Linear(97, 61, bias=False)
        self.last.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.second(self.first(self.words(tokens)).tanh())
        return self.last(h + self.rare(h) if int(tokens.flatten()[0]) % 2 else h)  # type: ignore[no-any-return]


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (2, 5), generator=generator) for _ in range(count)]


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).float().square().mean()  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def everything_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    divide_everything(monkeypatch)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_form_of_states_has_the_bits_of_plain_torch(precision: str, states: str) -> None:
    model = check_parity(Task(Odd, batches(), loss, precision, states=states), lazy=precision == "fp32", **ROOM)
    assert divided_buffers(model) >= {GRADIENT, *MOMENTS, *([MASTER] if precision == "bf16" else [])}
    assert model.memory_stats()["move/disk_read_bytes"] > 0  # type: ignore[operator]


@pytest.mark.parametrize(
    "options",
    [
        {"device_memory": "300KiB"},
        {"split_master": True},
        {"update_in_backward": True},
        {"max_norm": 0.1},
        {"host_memory": "6MiB"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_keep_their_bits(options: dict[str, Any]) -> None:
    task = Task(Odd, batches(), loss, "bf16")
    found, model = run_managed(task, **ROOM, **options)
    check_equal(found, run_managed(task, max_norm=options.get("max_norm", 0.0))[0])
    assert divided_buffers(model) >= MOMENTS


@pytest.mark.parametrize("name", ["SGD of Nesterov", "RMSprop with all", "Adagrad", "Adam amsgrad"])
def test_other_optimizers_have_the_bits_of_plain_torch(name: str) -> None:
    ours, plain = Other(name, ROOM), Other(name, None)
    assert divided_buffers(ours.model) >= {GRADIENT}
    for step in range(3):
        assert ours.step(step) == plain.step(step)
    check_same(ours, plain)


def test_an_average_follows_divided_masters() -> None:
    def averaged(**plugin: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model: Any = Odd()
        booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
        model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
        average = gemini.EMA(model, 0.9)
        for tokens in batches():
            booster.backward(loss(model, tokens), optimizer)
            optimizer.step()
            optimizer.zero_grad()
        assert bool(divided_buffers(model)) == bool(plugin)
        return dict(average.named_tensors())

    found, expected = averaged(**ROOM), averaged()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def owner_loss(model: nn.Module, number: int) -> Tensor:
    return loss(model, batches(8)[number])


@pytest.mark.parametrize(("precision", "states"), [("fp32", "fp32"), ("bf16", "8bit")])
def test_two_owners_divide_their_extents(precision: str, states: str) -> None:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = Odd()
        return model, HybridAdam(model.parameters(), lr=1e-2, states=states)

    ours, alone = (Owners(count, make, owner_loss, precision=precision, **ROOM) for count in (2, 1))
    assert ours.train(3) == alone.train(3)
    check_owners(ours, alone)
    assert all(divided_buffers(model) for model in ours.models)


def check_same_values(one: nn.Module, other: nn.Module) -> None:
    values, expected = one.state_dict(), other.state_dict()
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_values_go_home_are_saved_and_loaded_and_survive_a_release(tmp_path: Path) -> None:
    def trained(**plugin: Any) -> tuple[Booster, Any, Any]:
        torch.manual_seed(0)
        model: Any = Odd()
        booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
        model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
        return booster, model, optimizer

    def go_on(booster: Booster, model: Any, optimizer: Any) -> list[float]:
        losses = []
        for tokens in batches(2):
            value = loss(model, tokens)
            booster.backward(value, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        return losses

    ours, other = trained(**ROOM), trained()
    assert go_on(*ours) == go_on(*other)
    booster, model, optimizer = ours
    used = {tier: boosted(model).manager.ledger.used(tier) for tier in (Tier.HOST, Tier.DISK)}
    booster.save(tmp_path / "saved", model=model, optimizer=optimizer)
    booster.release(model, tmp_path / "parked")
    assert {home.tier for chunk in boosted(model).manager.chunks for home in chunk.homes.values()} == {Tier.DISK}
    assert not divided_buffers(model)
    booster.resume(model)
    assert divided_buffers(model) >= {MASTER, GRADIENT, *MOMENTS}
    copies = sum(chunk.full_nbytes for chunk in boosted(model).manager.chunks)
    now = {tier: boosted(model).manager.ledger.used(tier) for tier in (Tier.HOST, Tier.DISK)}
    assert now[Tier.DISK] == used[Tier.DISK] and abs(now[Tier.HOST] - used[Tier.HOST]) <= copies
    with torch.no_grad():  # an edit goes home on both sides of a boundary
        for each in (model, other[1]):
            each.second.weight.mul_(0.5)
    assert go_on(*ours) == go_on(*other)
    check_same_values(model, other[1])

    again, whole = trained(**ROOM), trained()
    for each in (again, whole):
        each[0].load(tmp_path / "saved", model=each[1], optimizer=each[2])
    assert go_on(*again) == go_on(*whole)
    check_same_values(again[1], whole[1])


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_homes_are_divided_elsewhere_as_capacities_change(states: str) -> None:
    def trained(resizes: bool) -> tuple[list[float], Any]:
        torch.manual_seed(0)
        model: Any = Odd()
        booster = Booster(plugin=GeminiPlugin(telemetry=False, host_memory="16MiB", **ROOM))
        model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2, states=states))
        manager, found = boosted(model).manager, []
        most = manager.ledger.used(Tier.HOST)
        for number, tokens in enumerate(batches(10)):
            value = loss(model, tokens)
            booster.backward(value, optimizer)
            found.append(value.item())
            if resizes:  # with gradients there, every other time
                boosted(model).engine.resize({Tier.HOST: max(most - number * 100_003, LEAST)})
                on_host = sum(chunk.plan.nbytes_on(Tier.HOST) for chunk in manager.chunks)
                assert on_host <= manager.ledger.used(Tier.HOST) <= manager.ledger.capacity(Tier.HOST)
                places.update(divided_buffers(model))
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        return found, model

    places = set[str]()
    (losses, ours), (expected, other) = trained(True), trained(False)
    assert losses == expected
    check_same_values(ours, other)
    assert places


def test_layers_are_unfrozen_beside_divided_homes() -> None:
    def losses(**plugin: Any) -> list[float]:
        model: Any = build_large()
        for parameter in model[4:].parameters():
            parameter.requires_grad_(False)
        booster = Booster(plugin=GeminiPlugin(telemetry=False, precision="bf16", **plugin))
        model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
        found = []
        for step in range(4):
            if step == 2:
                for parameter in model[4:].parameters():
                    parameter.requires_grad_(True)
            torch.manual_seed(step)
            value = model(torch.randn(4, 64)).float().square().mean()
            booster.backward(value, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.item())
        return found

    assert losses(**ROOM) == losses()


def test_statistics_count_each_part_on_its_tier() -> None:
    torch.manual_seed(0)
    model: Any = Odd()
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **ROOM))
    model, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
    plans = [chunk.plan for chunk in boosted(model).manager.chunks]
    stats, placed = model.memory_stats(), boosted(model).packing.placement.nbytes
    on = {tier: sum(plan.nbytes_on(tier) for plan in plans) for tier in Tier}
    assert on[Tier.HOST] == placed[Tier.HOST] and 0 < on[Tier.DISK] <= placed[Tier.DISK]
    assert stats["placement/offload_optim_frac"] == on[Tier.DISK] / (on[Tier.HOST] + on[Tier.DISK])


def test_the_first_chunk_is_divided_and_the_updates_of_later_ones_begin_in_backward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # as placement has it: RAM goes to what forward waits for first

    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(61, 97), *(nn.Linear(97, 97) for _ in range(12)))

    sizes = {"chunk_config_dict": {1: {"chunk_size": 9600}}, "host_memory": "640KiB", "offload_dir": tmp_path}
    run, model = run_managed(Task(build, batches(6), loss, "bf16"), **sizes)
    check_equal(run, run_plain(Task(build, batches(6), loss, "bf16")))
    chunks = boosted(model).manager.chunks
    divided = [index for index, chunk in enumerate(chunks) if len(chunk.plan.boundaries)]
    on_disk = [all(tier is Tier.DISK for tier in chunk.plan.tiers.values()) for chunk in chunks]
    assert len(divided) == 1 and on_disk == [index > divided[0] for index in range(len(chunks))]
    assert boosted(model).engine.updates._ahead.taken_count > 0
