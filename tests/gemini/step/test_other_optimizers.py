"""Element-wise torch optimizers under management: the bits of plain torch, wherever the chunks are."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from loop import check_same
from other_optimizers import OPTIMIZERS, OTHER_PLACEMENTS, LowPrecision, Other
from torch import Tensor, nn
from torch.optim import lr_scheduler

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MASTER, SHADOW, Tier
from gemini.errors import OutOfMemory
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer.rules import pieces

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


SOME = ["SGD", "SGD of Nesterov", "Adagrad", "RMSprop with all"]


def placed(placement: str, folder: Any) -> dict[str, Any]:
    options = dict(OTHER_PLACEMENTS[placement])
    if "offload_dir" in options:
        options["offload_dir"] = folder
    return options


def check_states(ours: Other, plain: Other) -> None:
    """The state dict is torch's own: same keys, same bits."""
    found, expected = ours.optimizer.state_dict(), plain.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert list(found["state"][index]) == list(state)
        for name, value in state.items():
            assert torch.equal(found["state"][index][name], value), (index, name)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("placement", OTHER_PLACEMENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_has_the_bits_of_plain_torch_wherever_the_chunks_are(name: str, placement: str, tmp_path: Any) -> None:
    ours, plain = Other(name, placed(placement, tmp_path)), Other(name, None)
    manager = ours.model._gemini.manager
    tiers = {home.tier for chunk in manager.chunks for home in (*chunk.homes.values(), chunk.gradient.buffer)}
    assert (Tier.DISK in tiers) == (placement == "disk")
    schedulers = [lr_scheduler.StepLR(run.optimizer, 2, 0.5) for run in (ours, plain)]
    for step in range(5):
        assert ours.step(step) == plain.step(step)
        for scheduler in schedulers:
            scheduler.step()
    check_same(ours, plain)
    check_states(ours, plain)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("placement", ["resident", "disk"])
def test_clipping_and_accumulation_have_the_bits_of_plain_torch(name: str, placement: str, tmp_path: Any) -> None:
    ours, plain = Other(name, placed(placement, tmp_path)), Other(name, None)
    for step in range(4):
        for run in (ours, plain):
            for micro in range(3):
                run.backward(run.loss(3 * step + micro) / 3)
        in_groups = [p for group in plain.optimizer.param_groups for p in group["params"]]
        norms = [
            ours.optimizer.clip_grad_by_norm(float("inf")),
            nn.utils.clip_grad_norm_(in_groups, float("inf")),
            ours.optimizer.clip_grad_by_norm(0.01, parameters=ours.model.parameters()),
            nn.utils.clip_grad_norm_(plain.model.parameters(), 0.01),
        ]
        assert torch.equal(*norms[:2]) and torch.equal(*norms[2:]) and norms[2] > 0.01
        for run in (ours, plain):
            run.optimizer.step()
            run.optimizer.zero_grad()
    check_same(ours, plain)
    check_states(ours, plain)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("placement", OTHER_PLACEMENTS)
def test_bf16_trains_fp32_masters(name: str, placement: str, tmp_path: Any) -> None:
    ours = Other(name, placed(placement, tmp_path), "bf16", max_norm=0.02)
    plain = LowPrecision(name, torch.bfloat16, max_norm=0.02)
    for step in range(5):
        assert ours.step(step) == plain.step(step)
    check_same(ours, plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SOME)
def test_fp16_unscales_and_skips_steps_that_overflow(name: str) -> None:
    ours = Other(name, {}, "fp16", max_norm=0.02, initial_scale=2.0**32, growth_interval=1000)
    plain = LowPrecision(name, torch.float16, max_norm=0.02)
    state = ours.model._gemini.step
    for step in range(30):
        skipped, loss = state.scaling.skipped_steps, ours.step(step)
        if state.scaling.skipped_steps == skipped:
            plain.loss_scale = state.scaling.scaler.scale
            assert plain.step(step) == loss
    assert 4 < state.scaling.skipped_steps < 26
    check_same(ours, plain)  # type: ignore[arg-type]


def test_hyperparameters_of_a_step_are_those_of_its_call_not_of_its_end() -> None:
    for name in ("SGD", "RMSprop"):
        ours, plain = Other(name, {}), Other(name, None)
        for step in range(4):
            for run in (ours, plain):
                run.step(step)
                for group in run.optimizer.param_groups:  # at once, while the background works
                    group["lr"] *= 0.7
                    group["weight_decay"] = 0.01 * step
        check_same(ours, plain)


def test_a_learning_rate_in_a_tensor_that_changes_in_place_counts_as_it_was() -> None:
    for name in ("SGD", "Adagrad"):
        runs = Other(name, {}), Other(name, None)
        for run in runs:
            for group in run.optimizer.param_groups:
                group["lr"] = torch.tensor(0.1)
        for step in range(3):
            for run in runs:
                run.step(step)
                for group in run.optimizer.param_groups:
                    group["lr"].mul_(0.5)
        check_same(*runs)


class Branches(nn.Module):
    """Parameters that have no gradient in some steps, one in float64, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.wide = nn.Parameter(torch.ones(5, dtype=torch.float64))
        self.linears[3].weight.requires_grad_(False)

    def forward(self, step: int) -> Tensor:
        x = torch.ones(2, 5)
        for i, linear in enumerate(self.linears):
            if step % 2 or i != 1:
                x = linear(x)
        return x.square().mean() + (self.wide * (step + 1)).sum()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_a_gradient_and_outside_of_chunks_go_as_in_torch(name: str) -> None:
    models, optimizers = [Branches(), Branches()], []
    cls, options = OPTIMIZERS[name]
    for model in models:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(cls(trainable, **{"lr": 1e-2, **options}))
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    models[0], optimizers[0], *_ = booster.boost(models[0], optimizers[0])
    for step in range(5):
        losses = [model(step) for model in models]
        assert torch.equal(losses[0].detach(), losses[1].detach())
        booster.backward(losses[0], optimizers[0])
        losses[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    ours, plain = (model.state_dict() for model in models)
    assert not [key for key, value in plain.items() if not torch.equal(ours[key], value)]
    found, expected = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert found.keys() == expected.keys()
    for index, state in expected.items():
        assert all(torch.equal(found[index][key], value) for key, value in state.items())


def test_an_optimizer_that_has_stepped_before_goes_on() -> None:
    for name in ("SGD of Nesterov", "SGD with momentum", "Adagrad", "Rprop"):
        plain, ours = Other(name, None), Other(name, None)
        for run in (plain, ours):
            for step in range(2):
                run.step(step)
        ours.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
        ours.is_managed = True
        ours.model, ours.optimizer, *_ = ours.booster.boost(ours.model, ours.optimizer)
        for step in range(2, 5):
            assert ours.step(step) == plain.step(step)
        check_same(ours, plain)
        check_states(ours, plain)


def test_plain_sgd_takes_4_bytes_a_parameter_and_the_gradient() -> None:
    for name, states in (("SGD", 0), ("SGD with momentum", 1), ("Adagrad", 1), ("RMSprop with all", 3)):
        run = Other(name, {}, "bf16")
        manager = run.model._gemini.manager
        numel = sum(chunk.layout.numel for chunk in manager.chunks)
        buffers = {name for chunk in manager.chunks for name in chunk.homes} - {MASTER, SHADOW}
        assert len(buffers) == states
        stats = run.model.memory_stats()
        assert stats["model_data/optimizer_bytes"] == 4 * states * numel
        assert stats["model_data/total_bytes"] == (4 + 4 * states + 2) * numel


def test_momentum_switched_on_after_boost_is_refused_and_off_and_on_goes_on() -> None:
    run = Other("SGD", {})
    run.step(0)
    run.backward(run.loss(1))
    weights = run.weights()
    run.optimizer.param_groups[1]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"SGD needs momentum_buffer with the options .* before booster.boost"):
        run.optimizer.step()
    assert all(torch.equal(value, weights[key]) for key, value in run.weights().items())
    run.optimizer.param_groups[1]["momentum"] = 0.0
    run.optimizer.step()

    runs = Other("SGD with momentum", {}), Other("SGD with momentum", None)
    for step, momentum in enumerate([0.0, 0.0, 0.9, 0.0, 0.5]):
        for each in runs:
            for group in each.optimizer.param_groups:
                group["momentum"] = momentum
            each.step(step)
    check_same(*runs)
    check_states(*runs)


@pytest.mark.parametrize("name", ["Adagrad", "SGD with momentum", "RMSprop"])
def test_models_built_without_memory_train_the_same(name: str, tmp_path: Any) -> None:
    class Lazy(Other):
        def build_model(self) -> nn.Module:
            with LazyInitContext():
                return super().build_model()

        def make_optimizer(self, model: nn.Module) -> Any:
            with LazyInitContext():  # Adagrad makes its states at once
                return super().make_optimizer(model)

    ours, plain = Lazy(name, placed("disk", tmp_path)), Other(name, None)
    for step in range(3):
        assert ours.step(step) == plain.step(step)
    check_same(ours, plain)
    check_states(ours, plain)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("placement", OTHER_PLACEMENTS)
@pytest.mark.parametrize("name", ["SGD of Nesterov", "Adagrad", "RMSprop with all"])
def test_memory_that_runs_out_in_the_background_costs_nothing(
    name: str, placement: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = Other(name, placed(placement, tmp_path)), Other(name, None)
    for run in (ours, plain):
        run.step(0)
    manager = ours.model._gemini.manager
    manager.settle()
    monkeypatch.setattr(pieces, "_CPU_PIECE_NUMEL", 1000)
    numbers = {0, 3, 4, 9, *range(12, 90, 7)}  # an update ahead of the step that fails is done again, without a word
    monkeypatch.setattr(pieces, "run", failing_in_the_middle(pieces.run, numbers))
    monkeypatch.setattr(pieces, "scratch", failing(pieces.scratch, numbers))
    assert ours.step(1) == plain.step(1)
    errors = 0
    for _ in range(20):
        try:
            manager.settle()
            break
        except OutOfMemory as error:
            assert "in the optimizer's update of " in str(error)
            errors += 1
    assert errors >= 1
    monkeypatch.undo()
    assert ours.step(2) == plain.step(2)
    check_same(ours, plain)
    check_states(ours, plain)


def failing(function: Callable[..., Any], numbers: set[int]) -> Callable[..., Any]:
    """A function some calls of which find no memory."""
    calls = iter(range(1 << 30))

    def call(*args: Any) -> Any:
        if next(calls) in numbers:
            raise MemoryError("no memory")
        return function(*args)

    return call


def failing_in_the_middle(run: Callable[..., None], numbers: set[int]) -> Callable[..., None]:
    """A `pieces.run` that has done a part of its work when it fails, where that work allocates."""
    check = failing(lambda: None, numbers)

    def call(work: Callable[[slice], object], of: Sequence[slice], device: torch.device) -> None:
        try:
            if work.__name__ == "keeping":
                check()
        except MemoryError:
            run(work, of[: len(of) // 2], device)
            raise
        run(work, of, device)

    return call


def test_a_boost_that_fails_leaves_the_optimizer_as_it_was() -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    with pytest.raises(OutOfMemory):
        Booster(plugin=GeminiPlugin(telemetry=False, host_memory=1000)).boost(model, optimizer)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(a, s["momentum_buffer"]) for a, s in zip(buffers, optimizer.state.values(), strict=True))
    optimizer.step()
    assert not torch.equal(model.weight, before["weight"])
