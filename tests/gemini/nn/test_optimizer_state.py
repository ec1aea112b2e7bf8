"""States move between HybridAdam and torch's optimizers, and training goes on bit-equally."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemini.nn.optimizer import HybridAdam


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 1e-2},
    ]


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def check_equal_weights(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("twin", [torch.optim.AdamW, torch.optim.Adam])
def test_training_goes_on_bit_equally_from_torch_to_ours_and_back(twin: type[torch.optim.Optimizer]) -> None:
    straight, moved = build(), build()
    torch_straight = twin(groups(straight), fused=True)
    train(straight, torch_straight, range(12))

    first = twin(groups(moved), fused=True)
    train(moved, first, range(4))
    # Made with other values on purpose: those of the loaded state count.
    second = HybridAdam(groups(moved), lr=1.0, adamw_mode=twin is torch.optim.Adam)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert second.param_groups[0]["adamw_mode"] is (twin is torch.optim.AdamW)
    train(moved, second, range(4, 8))
    third = twin(groups(moved), fused=True)
    third.load_state_dict(saved_and_loaded(second.state_dict()))
    assert third.param_groups[0]["fused"] is True
    train(moved, third, range(8, 12))

    check_equal_weights(straight, moved)
    for (x, a), (y, b) in zip(torch_straight.state.items(), third.state.items(), strict=True):
        assert torch.equal(x, y)
        assert all(torch.equal(a[name], b[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_a_state_of_ours_that_never_saw_torch_loads_into_torch() -> None:
    model = build()
    ours = HybridAdam(groups(model), weight_decay=0.0)
    train(model, ours, range(3))
    twin_model = copy.deepcopy(model)
    theirs = torch.optim.AdamW(groups(twin_model), fused=True)
    theirs.load_state_dict(saved_and_loaded(ours.state_dict()))
    for group in theirs.param_groups:
        group["fused"] = True  # it is in the state dict, as None: torch would take its default implementation
    train(model, ours, range(3, 8))
    train(twin_model, theirs, range(3, 8))
    check_equal_weights(model, twin_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_saved_and_loaded_state_continues_bit_equally(dtype: torch.dtype) -> None:
    straight, moved = build(dtype), build(dtype)
    train(straight, HybridAdam(groups(straight), bias_correction=False), range(8))
    first = HybridAdam(groups(moved), bias_correction=False)
    train(moved, first, range(4))
    second = HybridAdam(groups(moved))
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    train(moved, second, range(4, 8))
    check_equal_weights(straight, moved)
    assert second.param_groups[0]["bias_correction"] is False


def test_low_precision_states_of_torch_become_float32_with_a_new_master() -> None:
    model = build(torch.bfloat16)
    theirs = torch.optim.AdamW(model.parameters())
    train(model, theirs, range(2))
    ours = HybridAdam(model.parameters())
    ours.load_state_dict(theirs.state_dict())
    param = next(model.parameters())
    assert ours.state[param]["exp_avg"].dtype == torch.float32
    value = param.detach().float()
    train(model, ours, range(2, 3))
    assert torch.equal(ours.state[param]["master"].bfloat16(), param)
    assert not torch.equal(ours.state[param]["master"], value)


def test_loading_copies() -> None:
    model = build()
    first = HybridAdam(model.parameters())
    train(model, first, range(2))
    state_dict = first.state_dict()
    before = copy.deepcopy(state_dict)
    second = HybridAdam(model.parameters())
    second.load_state_dict(state_dict)
    train(model, second, range(2, 4))
    for index, state in state_dict["state"].items():
        assert all(torch.equal(state[name], before["state"][index][name]) for name in state)


def test_a_state_in_another_memory_layout_is_brought_into_the_parameters() -> None:
    value = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, param = nn.Parameter(value.clone()), nn.Parameter(value.to(memory_format=torch.channels_last))
    a, b = HybridAdam([plain]), HybridAdam([param])
    grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    plain.grad, param.grad = grad.clone(), grad.clone()
    a.step()
    b.load_state_dict(a.state_dict())
    assert b.state[param]["exp_avg"].stride() == param.stride()
    with torch.no_grad():
        param.copy_(plain)
    a.step()
    b.step()
    assert torch.equal(plain, param)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_a_state_with_an_option_it_lacks_is_refused_and_changes_nothing(option: str) -> None:
    model = build()
    theirs = torch.optim.AdamW(model.parameters(), **{option: True})
    train(model, theirs, range(1))
    ours = HybridAdam(model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=option):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5
    assert not ours.state


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model, other = build(), nn.Linear(3, 3)
    ours = HybridAdam(model.parameters(), lr=0.5)
    for wrong, message in [
        (torch.optim.AdamW(other.parameters()), r"\[2\] parameters"),
        (torch.optim.SGD(model.parameters(), momentum=0.9), "no step, exp_avg, exp_avg_sq"),
        (torch.optim.AdamW([nn.Parameter(torch.ones(5)) for _ in range(4)]), "shape"),
    ]:
        train(nn.ParameterList(wrong.param_groups[0]["params"]), wrong, range(1))
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(wrong.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5
    assert not ours.state
    assert not ours._optimizer_load_state_dict_pre_hooks


def test_hooks_of_the_user_see_plain_states() -> None:
    model = build()
    ours = HybridAdam(model.parameters())
    train(model, ours, range(1))
    seen: list[Any] = []
    ours.register_load_state_dict_pre_hook(lambda _, state_dict: seen.append(type(state_dict["state"][0])))
    ours.register_load_state_dict_post_hook(lambda o: seen.append(type(o.state[o.param_groups[0]["params"][0]])))
    ours.load_state_dict(ours.state_dict())
    assert seen == [dict, dict]


def test_changing_the_mode_of_a_group_reaches_the_key_that_torch_reads() -> None:
    ours = HybridAdam([nn.Parameter(torch.ones(2))])
    ours.param_groups[0]["adamw_mode"] = False
    assert ours.state_dict()["param_groups"][0]["decoupled_weight_decay"] is False


@pytest.mark.parametrize("twin", [torch.optim.AdamW, torch.optim.Adam])
def test_a_torch_optimizer_is_taken_over_with_groups_states_scheduler_and_hooks(
    twin: type[torch.optim.Optimizer],
) -> None:
    straight, moved = build(), build()
    theirs, source = twin(groups(straight), fused=True), twin(groups(moved), fused=True)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5) for o in (theirs, source)]
    for step in range(3):
        train(straight, theirs, range(step, step + 1))
        train(moved, source, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    called: list[int] = []
    handle = source.register_step_post_hook(lambda *_: called.append(1))

    dicts, tensors = list(source.param_groups), [state["exp_avg"] for state in source.state.values()]
    ours = HybridAdam.from_torch(source)
    assert all(a is b for a, b in zip(dicts, ours.param_groups, strict=True))
    assert all(a is b["exp_avg"] for a, b in zip(tensors, ours.state.values(), strict=True))
    assert not source.state

    for step in range(3, 8):
        train(straight, theirs, range(step, step + 1))
        train(moved, ours, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
    check_equal_weights(straight, moved)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 1e-3
    assert len(called) == 5
    handle.remove()
    train(moved, ours, range(1))
    assert len(called) == 5


def test_a_scheduler_of_a_fresh_torch_optimizer_does_not_warn_after_taking_over() -> None:
    model = build()
    source = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(source, step_size=1)
    ours = HybridAdam.from_torch(source)
    train(model, ours, range(1))
    scheduler.step()  # warnings are errors in these tests
    assert ours.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_named_parameters_survive_taking_over_and_loading() -> None:
    model = build()
    ours = HybridAdam.from_torch(torch.optim.AdamW(model.named_parameters()))
    assert ours.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    train(model, ours, range(1))
    again = HybridAdam(model.named_parameters())
    again.load_state_dict(ours.state_dict())
    assert again.param_groups[0]["param_names"] == ours.param_groups[0]["param_names"]


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_a_torch_optimizer_with_an_option_it_lacks_is_refused_unchanged(option: str) -> None:
    source = torch.optim.AdamW(build().parameters(), **{option: True})
    with pytest.raises(ValueError, match=option):
        HybridAdam.from_torch(source)
    assert "adamw_mode" not in source.param_groups[0]


def test_other_optimizers_are_not_taken_over() -> None:
    class Mine(torch.optim.AdamW):
        pass

    params: list[Tensor] = [nn.Parameter(torch.ones(2))]
    for source in (torch.optim.SGD(params), torch.optim.NAdam(params), Mine(params)):
        with pytest.raises(TypeError, match=type(source).__name__):
            HybridAdam.from_torch(source)  # type: ignore[arg-type]
