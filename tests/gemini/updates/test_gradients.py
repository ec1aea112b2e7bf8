"""What ``p.grad`` of a managed parameter shows, and that what users do to it counts as in plain PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import masters
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.updates.absent_gradient import AbsentGradient

Between = Callable[[int, list[nn.Parameter], torch.optim.Optimizer], None]
SMALL_CHUNKS = {"chunk_config_dict": {1: {"chunk_size": 1024}}}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(64, 64), nn.Tanh())))


def batch(step: int) -> Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(batch(step)).pow(2).sum() * 10


def boost(model: nn.Module, **plugin: Any) -> tuple[nn.Module, HybridAdam, Booster]:
    booster = Booster(plugin=GeminiPlugin(**{"precision": "fp32", "telemetry": False, **SMALL_CHUNKS, **plugin}))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1))
    return model, optimizer, booster


def train_plain(between: Between, steps: int = 4, backwards: int = 1) -> dict[str, Tensor]:
    model = build()
    optimizer = HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        for i in range(backwards):
            loss_of(model, 10 * step + i).backward()
            between(i, list(model.parameters()), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_managed(between: Between, steps: int = 4, backwards: int = 1, **plugin: Any) -> dict[str, Tensor]:
    model = build()
    kept = list(model.parameters())  # not through the model, which would wait for updates
    model, optimizer, booster = boost(model, **plugin)
    for step in range(steps):
        for i in range(backwards):
            booster.backward(loss_of(model, 10 * step + i), optimizer)
            between(i, kept, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return masters(model)


def check_same(between: Between, backwards: int = 1, **plugin: Any) -> None:
    expected = train_plain(between, backwards=backwards)
    found = train_managed(between, backwards=backwards, **plugin)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def nothing(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    pass


def clip_norm(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    assert clip_grad_norm_(params, 0.5) > 0.5


def clip_value(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    clip_grad_value_(params, 0.1)


def forget_one(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[2].grad = None


def replace_one(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    params[1].grad = torch.full_like(params[1], 0.25)


def scale_all(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for param in params:
        assert param.grad is not None
        param.grad.mul_(0.5)


def zero_all(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    if i == 0:
        for param in params:
            assert param.grad is not None
            param.grad.zero_()


def forget_all(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    if i == 0:
        for param in params:
            param.grad = None


EDITS = {edit.__name__: edit for edit in (clip_norm, clip_value, forget_one, replace_one, scale_all)}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("between", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("plugin", [{}, {"device_memory": "36KiB"}], ids=["resident", "streamed"])
def test_what_is_done_to_gradients_counts_as_in_plain_pytorch(between: Between, plugin: dict[str, Any]) -> None:
    check_same(between, **plugin)
    assert any(
        not torch.equal(a, b) for a, b in zip(train_plain(between).values(), train_plain(nothing).values(), strict=True)
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("between", [nothing, zero_all, forget_all, *EDITS.values()])
def test_between_two_backwards_too(between: Between) -> None:
    check_same(between, backwards=2)


@pytest.mark.parametrize("between", [nothing, forget_one, forget_all, replace_one])
def test_forgetting_and_replacing_work_also_where_the_gradient_is_on_disk(between: Between, tmp_path: Path) -> None:
    check_same(between, backwards=2, host_memory="300KiB", offload_dir=tmp_path)


def test_gradients_can_be_read_and_are_those_of_plain_pytorch() -> None:
    plain, model = build(), build()
    kept = dict(model.named_parameters())
    model, optimizer, booster = boost(model)
    loss_of(plain, 0).backward()
    booster.backward(loss_of(model, 0), optimizer)
    for name, parameter in plain.named_parameters():
        assert torch.equal(kept[name].grad, parameter.grad)
    optimizer.zero_grad()
    assert all(p.grad is None for p in kept.values())


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_backward_that_builds_a_graph_adds_up_too() -> None:
    model = build()
    expected = {}
    for _ in range(2):
        loss_of(model, 0).backward(create_graph=True)
    expected = {name: p.grad.detach().clone() for name, p in model.named_parameters()}
    model = build()
    kept = dict(model.named_parameters())
    model, optimizer, _ = boost(model)
    for _ in range(2):
        loss_of(model, 0).backward(create_graph=True)
    assert all(torch.equal(expected[name], kept[name].grad) for name in kept)
    assert all(p.grad.requires_grad for p in kept.values())
    optimizer.step()
    assert all(torch.equal(expected[name], kept[name].grad) for name in kept)
    optimizer.zero_grad()
    assert all(p.grad is None for p in kept.values())


def test_gradients_stay_after_a_step_until_they_are_cleared_by_anyone() -> None:
    model, plain = build(), build()
    model, optimizer, booster = boost(model)
    theirs = HybridAdam(plain.parameters(), lr=1e-2, weight_decay=0.1)
    cleared: list[Callable[[nn.Parameter], object]] = [
        lambda p: setattr(p, "grad", None),
        lambda p: delattr(p, "grad"),
        lambda p: p.grad.zero_(),
        lambda p: None,
    ]
    for step, clear in enumerate(cleared):
        booster.backward(loss_of(model, step), optimizer)
        loss_of(plain, step).backward()
        optimizer.step()
        theirs.step()
        for ours, its in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, its.grad)
            clear(ours)
            clear(its)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_gradients_made_by_hand_are_used() -> None:
    def by_hand(i: int, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        for j, param in enumerate(params):
            param.grad = torch.full(param.shape, 0.1 * (j + 1))

    check_same(by_hand)
    model = build()
    kept = list(model.parameters())
    model, optimizer, _ = boost(model)
    plain = build()
    theirs = HybridAdam(plain.parameters(), lr=1e-2, weight_decay=0.1)
    by_hand(0, kept, optimizer)
    by_hand(0, list(plain.parameters()), theirs)
    optimizer.step()  # without any backward
    theirs.step()
    assert all(torch.equal(masters(model)[name], p) for name, p in plain.named_parameters())


def test_gradients_that_are_elsewhere_are_copied_for_who_asks_where_there_is_memory(tmp_path: Path) -> None:
    for between in EDITS.values():
        check_same(between, host_memory="300KiB", offload_dir=tmp_path)


@pytest.mark.parametrize("foreach", [None, False, True])
def test_clipping_with_torch_needs_no_memory_for_copies(foreach: bool | None, tmp_path: Path) -> None:
    plain, ours = build(), build()
    kept, theirs = list(ours.parameters()), list(plain.parameters())
    ours, optimizer, booster = boost(ours, host_memory="300KiB", offload_dir=tmp_path)
    other = HybridAdam(theirs, lr=1e-2)
    boosted(ours).manager.eviction.headroom = lambda: 0
    for group in (optimizer.param_groups[0], other.param_groups[0]):
        group.update(lr=1e-2, weight_decay=0.0)
    for step in range(4):
        booster.backward(loss_of(ours, step), optimizer)
        loss_of(plain, step).backward()
        assert any(isinstance(p.grad, AbsentGradient) for p in kept)
        norms = [clip_grad_norm_(each, 0.5, foreach=foreach) for each in (kept, theirs)]
        assert torch.equal(*norms)
        by_hand = [torch.stack([p.grad.detach().norm(2) for p in each]) for each in (kept, theirs)]  # type: ignore
        assert torch.equal(*by_hand)
        for each in (kept, theirs):
            torch.nn.utils.clip_grad_value_(each, 0.01, foreach=foreach)
            total = torch.nn.utils.get_total_norm([p.grad for p in each if p.grad is not None])
            torch.nn.utils.clip_grads_with_norm_(each, 0.3, total)
            for p in each:
                assert p.grad is not None
                p.grad.data.mul_(0.5)
        held = next(p.grad for p in kept if isinstance(p.grad, AbsentGradient))
        for each_optimizer in (optimizer, other):
            each_optimizer.step()
            each_optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="this gradient has been forgotten"):
            held.norm()
    assert all(torch.equal(masters(ours)[name], p) for name, p in plain.named_parameters())


def test_reading_gradients_without_memory_for_copies_says_what_to_do_and_training_goes_on(tmp_path: Path) -> None:
    model = build()
    kept = list(model.parameters())
    model, optimizer, booster = boost(model, host_memory="300KiB", offload_dir=tmp_path)
    boosted(model).manager.eviction.headroom = lambda: 0
    booster.backward(loss_of(model, 0), optimizer)
    absent = [p.grad for p in kept if isinstance(p.grad, AbsentGradient)]
    assert absent
    for read in (torch.clone, lambda g: g.view(-1), lambda g: g.add_(g), lambda g: g.cpu().float(), str):
        if read is str:
            assert "kept on disk" in str(absent[0])
        else:
            with pytest.raises(RuntimeError, match="kept on disk"):
                read(absent[0])
    assert absent[0].shape in [p.shape for p in kept]
    assert absent[0].dtype is torch.float32
    assert optimizer.clip_grad_by_norm(0.5) > 0.5
    optimizer.step()
    optimizer.zero_grad()
    booster.backward(loss_of(model, 1), optimizer)
    optimizer.step()


def test_scaled_gradients_of_fp16_are_not_shown() -> None:
    model = build()
    kept = list(model.parameters())
    model, optimizer, booster = boost(model, precision="fp16", initial_scale=2.0**4)
    booster.backward(loss_of(model, 0), optimizer)
    with pytest.raises(RuntimeError, match="loss scale of fp16"):
        clip_grad_norm_(kept, 1.0)
    optimizer.step()


def test_the_gradient_scaler_of_torch_works_with_a_boosted_optimizer() -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(6):
            factor = float("inf") if step == 3 else 1.0
            scaler.scale(loss_of(model, step) * factor).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    plain, model = build(), build()
    train(plain, HybridAdam(plain.parameters(), lr=1e-2, weight_decay=0.1))
    model, optimizer, _ = boost(model)
    train(model, optimizer)
    assert all(torch.equal(masters(model)[name], p) for name, p in plain.named_parameters())


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_gradient_that_is_held_over_a_step_and_cleared_by_hand_is_gone() -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        kept = list(model.parameters())
        for step in range(3):
            loss_of(model, step).backward(create_graph=step == 0)  # with a graph it stays the tensor that it was
            held = [p.grad for p in kept]
            optimizer.step()
            assert len(held) == sum(p.grad is not None for p in kept)
            for parameter in kept:
                parameter.grad = None

    plain, model = build(), build()
    train(plain, HybridAdam(plain.parameters(), lr=1e-2, weight_decay=0.1))
    model, optimizer, _ = boost(model)
    train(model, optimizer)
    assert all(torch.equal(masters(model)[name], p) for name, p in plain.named_parameters())


def test_a_dropped_model_is_freed_although_its_parameters_are_kept() -> None:
    import gc
    import weakref

    model = build()
    kept = list(model.parameters())
    model, optimizer, booster = boost(model)
    booster.backward(loss_of(model, 0), optimizer)
    gradients = weakref.ref(model._gemini.engine.updates.gradients)
    del model, optimizer, booster
    gc.collect()
    assert gradients() is None
    assert len(kept) == 10
