"""HybridAdam on its own is a ``torch.optim.Optimizer``: groups, schedulers, closures, hooks, clipping, copies."""

import copy
from typing import Any

import pytest
import torch
from adam_cases import give_gradients, pair
from torch import Tensor, nn

from gemini.nn.optimizer import HybridAdam

STEPS = 12


def test_a_parameter_without_a_gradient_is_not_touched() -> None:
    used, unused = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))
    optimizer = HybridAdam([used, unused], weight_decay=0.5)
    used.grad = torch.ones(16)
    optimizer.step()
    assert torch.equal(unused, torch.ones(16))
    assert unused not in optimizer.state
    # Its own count of steps starts when its first gradient comes.
    unused.grad = torch.ones(16)
    optimizer.step()
    assert (optimizer.state[used]["step"].item(), optimizer.state[unused]["step"].item()) == (2.0, 1.0)


def test_each_group_has_its_own_hyperparameters() -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, 32)) for _ in range(3)]
    twins = [nn.Parameter(torch.linspace(-1, 1, 32)) for _ in range(3)]
    ours = HybridAdam(
        [
            {"params": [params[0]], "weight_decay": 0.1},
            {"params": [params[1]], "lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4},
            {"params": [params[2]], "adamw_mode": False, "weight_decay": 0.3},
        ]
    )
    theirs = [
        torch.optim.AdamW([twins[0]], weight_decay=0.1, fused=True),
        torch.optim.AdamW([twins[1]], lr=0.1, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.0, fused=True),
        torch.optim.Adam([twins[2]], weight_decay=0.3, fused=True),
    ]
    for step in range(STEPS):
        give_gradients((*params, *twins), step)
        for optimizer in (ours, *theirs):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_a_graph_that_still_needs_the_old_value_is_noticed() -> None:
    param = nn.Parameter(torch.ones(16))
    optimizer = HybridAdam([param])
    loss = (param**2).sum()
    param.grad = torch.ones(16)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_prepare_and_commit_step_some_parameters_of_a_group() -> None:
    a, b, other = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))
    optimizer, twin = HybridAdam([a, other], weight_decay=0.1), HybridAdam([b], weight_decay=0.1)
    for step in range(3):
        give_gradients((a, b, other), step)
        b.grad *= 0.25
        optimizer.commit_parameters(optimizer.prepare_parameters(optimizer.param_groups[0], [a], grad_scale=0.25))
        twin.step()
    assert torch.equal(a, b)
    assert torch.equal(other, torch.ones(16))


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_equals_torch(norm_type: float) -> None:
    a, b = pair(100)
    give_gradients((a, b), 0)
    norm = HybridAdam([a]).clip_grad_by_norm(1.0, norm_type)
    assert torch.equal(norm, nn.utils.clip_grad_norm_([b], 1.0, norm_type))
    assert torch.equal(a.grad, b.grad)
    HybridAdam([a]).clip_grad_by_value(0.01)
    nn.utils.clip_grad_value_([b], 0.01)
    assert torch.equal(a.grad, b.grad)
    a.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        HybridAdam([a]).clip_grad_by_norm(1.0, error_if_nonfinite=True)


def test_the_gradient_scaler_of_torch_works_with_it() -> None:
    param = nn.Parameter(torch.ones(16))
    optimizer = HybridAdam([param], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in [(float("inf"), 1.0), (1.0, 0.5)]:
        optimizer.zero_grad()
        scaler.scale(param.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(param.detach(), torch.full((16,), expected))


def test_a_copied_optimizer_is_independent() -> None:
    model = nn.Linear(4, 4)
    optimizer = HybridAdam(model.parameters(), nvme_offload_dir="somewhere")
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.nvme_offload_dir == "somewhere"
    before = model.weight.clone()
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    twin.step()
    assert torch.equal(model.weight, before)


class Manager:
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def step(self, optimizer: HybridAdam) -> None:
        self.calls.append(("step",))

    def zero_grad(self, optimizer: HybridAdam, set_to_none: bool) -> None:
        self.calls.append(("zero_grad",))

    def state_dict(self, optimizer: HybridAdam) -> dict[str, Any]:
        return {"managed": True}

    def load_state_dict(self, optimizer: HybridAdam, state_dict: dict[str, Any]) -> None:
        self.calls.append(("load_state_dict", state_dict))

    def add_param_group(self, optimizer: HybridAdam, group: dict[str, Any]) -> None:
        optimizer.register_param_group(group)

    def clip_grad_by_norm(
        self, optimizer: HybridAdam, max_norm: float, norm_type: float, error_if_nonfinite: bool, parameters: Any
    ) -> Tensor:
        self.calls.append(("clip_grad_by_norm", max_norm, norm_type, error_if_nonfinite, len(parameters)))
        return torch.tensor(7.0)

    def clip_grad_by_value(self, optimizer: HybridAdam, value: float) -> None:
        self.calls.append(("clip_grad_by_value", value))


def test_a_managed_optimizer_hands_everything_over() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer, manager = HybridAdam([param]), Manager()
    optimizer._managed = manager
    param.grad = torch.ones(4)
    assert optimizer.step(lambda: 5) == 5
    optimizer.zero_grad()
    assert optimizer.state_dict() == {"managed": True}
    optimizer.load_state_dict({"saved": 1})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert optimizer.clip_grad_by_norm(1.0).item() == 7.0
    optimizer.clip_grad_by_value(2.0)
    assert manager.calls == [
        ("step",),
        ("zero_grad",),
        ("load_state_dict", {"saved": 1}),
        ("clip_grad_by_norm", 1.0, 2.0, False, 2),
        ("clip_grad_by_value", 2.0),
    ]
    assert torch.equal(param, torch.ones(4))
    assert param.grad is not None
    assert len(optimizer.param_groups) == 2
    with pytest.raises(TypeError, match="save_optimizer"):
        copy.deepcopy(optimizer)
