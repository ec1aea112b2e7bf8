"""Parameters while nothing has their chunk pinned: what they cost, whom they keep alive, and who keeps them."""

import copy
import cProfile
import gc
import pickle
import pstats
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, SMALL, Trained, batch, check_same
from parity import Task, check_parity, tightest
from torch import Tensor, nn

import gemini
from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.usefixtures("one_thread")
TIGHT = {"device_memory": "36KiB", **SMALL}


@pytest.fixture(params=PLACEMENTS.values(), ids=PLACEMENTS)
def placement(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    placement = dict(request.param)
    if "offload_dir" in placement:
        placement["offload_dir"] = tmp_path
    return placement


# -- room


class Looks(nn.Module):
    """Looks at the weights of its parts, without using them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.outer.weight, Tensor) and self.outer.weight.dtype is x.dtype
        return self.outer(torch.relu(self.inner(x)))  # type: ignore[no-any-return]


def small_t5(layers: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, dropout_rate=0.0, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def loss_of_t5(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def sequence_of_looks(count: int) -> nn.Module:
    return nn.Sequential(*[Looks() for _ in range(count)])


@pytest.mark.parametrize(
    ("build", "batch", "loss", "counts"),
    [
        pytest.param(small_t5, torch.arange(2, 18).view(2, 8), loss_of_t5, (2, 8), id="T5"),
        pytest.param(sequence_of_looks, torch.ones(4, 32), mean_square, (12, 24), id="looks"),
    ],
)
def test_more_layers_need_no_more_room_on_the_device(build: Any, batch: Any, loss: Any, counts: Any) -> None:
    small = {"chunk_config_dict": {1: {"chunk_size": 1024}}}
    tasks = [Task(lambda n=n: build(n), [batch] * 3, loss) for n in counts]
    few, many = (tightest(task, "device", **small) for task in tasks)
    assert many <= 1.1 * few
    model = check_parity(tasks[1], device_memory=many, **small)
    assert boosted(model).manager.ledger.peak_overdraft(Tier.DEVICE) == 0


READINGS: dict[str, Callable[[Any, Path], object]] = {
    "named tensors": lambda run, folder: [value.sum() for _, value in gemini.named_tensors(run.model)],
    "state dict": lambda run, folder: run.model.state_dict(),
    "state dict of a part": lambda run, folder: run.model[3].state_dict(),
    "save_model": lambda run, folder: run.booster.save_model(run.model, str(folder / "model")),
    "save_optimizer": lambda run, folder: run.booster.save_optimizer(run.optimizer, str(folder / "optimizer")),
    "by name": lambda run, folder: [m.weight.norm() for m in run.model if isinstance(m, nn.Linear)],
    "named parameters": lambda run, folder: [p.square().sum() for _, p in run.model.named_parameters()],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("moment", ["at rest", "after a forward", "after a dropped forward", "after a backward"])
def test_reading_at_any_moment_takes_no_room_that_training_has_not(
    read: Callable[[Any, Path], object], moment: str, tmp_path: Path
) -> None:
    ours, plain = Trained(TIGHT), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    torch.manual_seed(8)
    loss = ours.loss(1) if moment != "at rest" else None
    if moment == "after a dropped forward":
        loss = None
    if moment == "after a backward":
        ours.backward(loss)
    read(ours, tmp_path)
    assert boosted(ours.model).manager.ledger.peak_overdraft(Tier.DEVICE) == 0
    if moment == "after a forward":
        ours.backward(loss)
    if moment in ("after a forward", "after a backward"):
        ours.optimizer.step()
        ours.optimizer.zero_grad()
        torch.manual_seed(8)
        plain.step(1)
    for run in (ours, plain):
        torch.manual_seed(9)
        run.step(2)
    check_same(ours, plain)


def test_what_is_held_beyond_the_capacity_is_counted_and_given_back() -> None:
    run = Trained(TIGHT)
    run.step(0)
    manager = boosted(run.model).manager
    held = [p.data for p in run.model.parameters()]
    assert run.model.memory_stats()["device/overdraft_peak_bytes"] > 0
    assert all(torch.equal(a, b) for a, b in zip(held, run.model.parameters(), strict=True))
    del held
    run.step(1)
    assert manager.ledger.overdraft(Tier.DEVICE) == 0
    assert manager.ledger.used(Tier.DEVICE) <= manager.ledger.capacity(Tier.DEVICE)


def test_where_the_system_has_no_memory_holding_is_refused_and_training_goes_on() -> None:
    ours, plain = Trained(TIGHT), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    boosted(ours.model).manager.eviction.headroom = lambda: 0
    with pytest.raises(gemini.errors.OutOfMemory, match="device_memory"):
        [p.data for p in ours.model.parameters()]
    for run in (ours, plain):
        torch.manual_seed(8)
        run.step(1)
    check_same(ours, plain)


# -- life


class KeepsAPenalty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.penalty: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.penalty = self.layer.weight.square().sum()
        return self.layer(x)  # type: ignore[no-any-return]


def with_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("build", [KeepsAPenalty, with_weight_norm])
def test_a_model_that_keeps_a_graph_in_an_attribute_is_freed(build: Callable[[], nn.Module]) -> None:
    model = build()
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    for _ in range(2):
        booster.backward(model(torch.randn(4, 16)).square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    seen = [weakref.ref(model), *map(weakref.ref, model.parameters()), weakref.ref(boosted(model).manager)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in seen] == [None] * len(seen)


def test_a_parameter_outlives_its_model_with_its_values(placement: dict[str, Any]) -> None:
    run = Trained(placement)
    run.step(0)
    kept = [run.model[0].weight, run.model[3].bias]
    expected = [p.detach().clone() for p in kept]
    with torch.no_grad():
        kept[0].mul_(2)
        expected[0].mul_(2)
    seen = weakref.ref(run.model)
    del run
    gc.collect()
    assert seen() is None
    for parameter, value in zip(kept, expected, strict=True):
        try:
            assert torch.equal(parameter, value)
            assert type(parameter) is nn.Parameter
        except RuntimeError as error:
            assert "on disk in the chunks of a boosted model that is gone" in str(error)


def test_a_part_can_be_copied_and_pickled_and_is_a_plain_module_then(placement: dict[str, Any]) -> None:
    run, plain = Trained(placement), Trained(None)
    for each in (run, plain):
        torch.manual_seed(7)
        each.step(0)
    for copied in (copy.deepcopy(run.model[3]), pickle.loads(pickle.dumps(run.model[3]))):
        assert torch.equal(copied(batch(1)), plain.model[3](batch(1)))
        assert {type(p) for p in copied.parameters()} == {nn.Parameter}
        copied(batch(1)).sum().backward()
        with torch.no_grad():
            copied.weight.zero_()
    for each in (run, plain):
        torch.manual_seed(8)
        each.step(1)
    check_same(run, plain)


# -- other threads, and cost


def test_another_thread_reads_between_steps_while_updates_are_under_way(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    parameters, read = list(ours.model.parameters()), []
    for step in range(3):
        for run in (ours, plain):
            torch.manual_seed(step)
            run.step(step)
        reader = threading.Thread(target=lambda: read.append([p.detach().clone() for p in parameters]))
        reader.start()
        reader.join(60)
        assert not reader.is_alive() and len(read) == step + 1
        assert all(torch.equal(a, b) for a, b in zip(read[-1], plain.model.parameters(), strict=True))
    check_same(ours, plain)


def calls_of_first_forward(modules: int) -> int:
    model: nn.Module = nn.Sequential(*[m for _ in range(modules) for m in (nn.Linear(8, 8), nn.LayerNorm(8))])
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, *_ = booster.boost(model, HybridAdam(model.parameters()))
    profile = cProfile.Profile()
    profile.runcall(model, torch.randn(2, 8))
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined, no-any-return]


def test_the_first_forward_costs_by_the_module_and_not_by_its_square() -> None:
    few, many = calls_of_first_forward(20), calls_of_first_forward(80)
    assert many < 4.5 * few
