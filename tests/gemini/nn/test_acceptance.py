"""Optimizers that cannot be boosted are told apart, with the reason."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.acceptance import accepted


class Lamb(torch.optim.SGD):
    """As third parties name it."""


class MyAdamW(torch.optim.AdamW):
    pass


class Unheard(Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})


REFUSED = [
    (Lamb, "Lamb: it scales each tensor's update by norms"),
    (torch.optim.LBFGS, "LBFGS: it searches"),
    (torch.optim.SparseAdam, "SparseAdam: it is for sparse gradients"),
    (MyAdamW, r"MyAdamW, a subclass, .* call gemini.nn.optimizer.register_elementwise\(MyAdamW"),
    (Unheard, "Unheard, which is not known to be element-wise"),
]


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
def test_an_optimizer_that_is_not_adam_is_refused_before_anything_changes(kind: Any, reason: str) -> None:
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    with pytest.raises(TypeError, match=reason):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, kind(model.parameters(), lr=0.1))
    assert type(model) is nn.Linear
    assert torch.equal(model.weight, before)


def test_adam_adamw_and_ours_are_accepted() -> None:
    params = [nn.Parameter(torch.ones(2))]
    ours = HybridAdam(params)
    assert accepted(ours) is ours
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        assert isinstance(accepted(kind(params)), HybridAdam)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}, r"pieces of a tensor get other .* Leave out fused=True"),
        (torch.optim.SGD, {"differentiable": True}, r"SGD\(differentiable=True\) cannot be boosted"),
        (torch.optim.RMSprop, {"capturable": True}, r"RMSprop\(capturable=True\) cannot be boosted"),
    ],
)
def test_options_that_are_not_elementwise_are_refused_and_nothing_has_changed(
    kind: Any, options: dict[str, Any], reason: str
) -> None:
    model = nn.Linear(4, 4, bias=False)
    before, optimizer = model.weight.detach().clone(), kind(model.parameters(), lr=0.1, **options)
    drawn = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=reason):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, optimizer)
    assert type(model) is nn.Linear
    assert torch.equal(model.weight, before)
    assert torch.equal(torch.random.get_rng_state(), drawn)
