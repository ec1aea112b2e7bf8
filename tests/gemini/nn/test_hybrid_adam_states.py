"""HybridAdam with reduced states on plain parameters: bytes, checkpoints, layouts, convergence, refusals."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gemini.nn.optimizer import HybridAdam

REDUCED = ["bf16", "8bit"]
BYTES = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 8 / 256}


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def check_equal_weights(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("states", ["fp32", *REDUCED])
def test_states_take_the_bytes_that_they_should(states: str) -> None:
    model = nn.Linear(1024, 256, bias=False)
    optimizer = HybridAdam(model.parameters(), states=states)
    train(model, optimizer, range(1))
    kept = [t for name, t in optimizer.state[model.weight].items() if name != "step"]
    assert sum(t.numel() * t.element_size() for t in kept) == BYTES[states] * model.weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", REDUCED)
def test_a_round_trip_through_a_checkpoint_changes_nothing_of_what_follows(states: str, dtype: torch.dtype) -> None:
    straight, moved = build(dtype), build(dtype)
    optimizer, first = (HybridAdam(m.parameters(), states=states, weight_decay=0.1) for m in (straight, moved))
    train(straight, optimizer, range(8))
    train(moved, first, range(4))
    saved = through_a_file(first.state_dict())
    second = HybridAdam(moved.parameters(), states=states, weight_decay=0.1)
    second.load_state_dict(saved)
    train(moved, second, range(4, 8))
    check_equal_weights(straight, moved)


@pytest.mark.parametrize("states", REDUCED)
def test_state_dicts_have_the_layout_of_torch_and_go_both_ways(states: str) -> None:
    model = build()
    ours = HybridAdam(model.parameters(), states=states)
    train(model, ours, range(3))
    saved = ours.state_dict()
    for param, state in zip(model.parameters(), saved["state"].values(), strict=True):
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert state["exp_avg"].shape == param.shape
        assert state["exp_avg"].stride() == param.stride()
    theirs = torch.optim.AdamW(build().parameters())
    theirs.load_state_dict(through_a_file(saved))
    full = HybridAdam(copy.deepcopy(model).parameters())
    full.load_state_dict(theirs.state_dict())
    for a, b in zip(full.state.values(), saved["state"].values(), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])
    # And back, from float32 moments of any value.
    train(build(), full, range(1))
    again = HybridAdam(model.parameters(), states=states)
    again.load_state_dict(full.state_dict())
    for a, b in zip(again.state_dict()["state"].values(), full.state_dict()["state"].values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            # Of a block's largest element: the small ones of an 8-bit block have steps of 2**-17 of it.
            assert (a[name] - b[name]).abs().max() <= b[name].abs().max() * 2**-4


def test_state_dict_hooks_of_users_see_what_users_get() -> None:
    model = build()
    optimizer = HybridAdam(model.parameters(), states="8bit")
    train(model, optimizer, range(1))
    seen: list[torch.dtype] = []
    optimizer.register_state_dict_post_hook(
        lambda opt, saved: seen.extend(state["exp_avg"].dtype for state in saved["state"].values())
    )
    optimizer.state_dict()
    assert seen == [torch.float32] * 4


@pytest.mark.parametrize("states", REDUCED)
def test_copies_and_pickles_keep_their_states(states: str) -> None:
    model = build()
    optimizer = HybridAdam(model.parameters(), states=states)
    train(model, optimizer, range(2))
    for again in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        straight = copy.deepcopy((model, optimizer))
        train(again[0], again[1], range(2, 4))
        train(straight[0], straight[1], range(2, 4))
        check_equal_weights(again[0], straight[0])
        assert again[1].state[next(again[0].parameters())]["exp_avg"].dtype != torch.float32


@pytest.mark.parametrize("states", REDUCED)
def test_the_layout_of_a_parameter_does_not_change_its_numbers(states: str) -> None:
    values = torch.randn(6, 8, 7, 9)
    gapped = torch.zeros(6, 8, 7, 18)[..., ::2].copy_(values)
    permuted = values.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    flat_of_permuted = permuted.permute(1, 3, 0, 2).contiguous()
    grads = [torch.randn(6, 8, 7, 9) for _ in range(5)]

    def trained(start: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        param = nn.Parameter(start)
        optimizer = HybridAdam([param], states=states)
        for grad in grads:
            param.grad = grad.permute(order)
            optimizer.step()
        return param.detach()

    plain = trained(values.clone(), (0, 1, 2, 3))
    assert torch.equal(trained(gapped, (0, 1, 2, 3)), plain)
    # Blocks follow memory, so one laid out otherwise equals the contiguous tensor that lies as it does.
    assert torch.equal(trained(permuted, (0, 1, 2, 3)).permute(1, 3, 0, 2), trained(flat_of_permuted, (1, 3, 0, 2)))


def loss_after(states: str, steps: int) -> float:
    """The mean loss of the last tenth of a student that learns from a teacher."""
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)) for _ in range(2))
    optimizer = HybridAdam(model.parameters(), lr=1e-2, states=states)
    losses = []
    for _ in range(steps):
        inputs = torch.randn(64, 8)
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.1
    return sum(losses[-(steps // 10) :]) / (steps // 10)


def test_training_with_reduced_states_ends_at_about_the_same_loss() -> None:
    full = loss_after("fp32", 400)
    assert full < 0.01  # it has learned
    for states in REDUCED:
        reduced = loss_after(states, 400)
        assert reduced != full
        assert abs(reduced / full - 1) < 0.25, (states, reduced, full)


@pytest.mark.parametrize("states", REDUCED)
def test_float64_parameters_are_refused_and_nothing_is_added(states: str) -> None:
    with pytest.raises(TypeError, match="not for float64"):
        HybridAdam([torch.zeros(3, dtype=torch.float64, requires_grad=True)], states=states)
    optimizer = HybridAdam([torch.zeros(3, requires_grad=True)], states=states)
    with pytest.raises(TypeError, match="not for float64"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.float64, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="states must be 'fp32', 'bf16' or '8bit', got 'fp8'"):
        HybridAdam([torch.zeros(3, requires_grad=True)], states="fp8")
