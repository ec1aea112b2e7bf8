"""Layers that are unfrozen in the middle of training: what is refused, and the way out, with plain PyTorch's bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, batch, build
from parity import masters
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.timeout(120)

STEPS, UNFROZEN_AT = 6, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def rounded(precision: str) -> nn.Module:
    """A model whose values both dtypes can hold."""
    model = build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision]).float()
    return model


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What trains from the start, and what is frozen at first: every other layer."""
    layers = [module for module in model if list(module.parameters())]  # type: ignore[attr-defined]
    return tuple([p for layer in layers[i::2] for p in layer.parameters()] for i in (1, 0))  # type: ignore[return-value]


def train_plain(precision: str) -> tuple[list[float], dict[str, Tensor]]:
    model = rounded(precision).to(DTYPES[precision])
    head, rest = parts(model)
    for parameter in rest:
        parameter.requires_grad_(False)
    optimizer = HybridAdam(head, **OPTIONS)
    losses = []
    for step in range(STEPS):
        if step == UNFROZEN_AT:
            for parameter in rest:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": rest, "lr": 3e-3})
        torch.manual_seed(step)
        loss = model(batch(step).to(DTYPES[precision])).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: optimizer.state[p].get("master", p).detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("placement", "in_backward", "precision"),
    [
        ("resident", False, "fp32"),
        ("resident", True, "bf16"),
        ("streamed", True, "fp32"),
        ("streamed", False, "bf16"),
        ("disk", False, "fp32"),
        ("disk", True, "bf16"),
    ],
)
def test_what_is_frozen_after_boosting_is_unfrozen_with_the_bits_of_plain_pytorch(
    placement: str, in_backward: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = rounded(precision)
    head, rest = parts(model)
    optimizer: Any = HybridAdam([{"params": head}, {"params": rest, "lr": 3e-3}], **OPTIONS)
    plugin = GeminiPlugin(precision=precision, telemetry=False, update_in_backward=in_backward, **PLACEMENTS[placement])
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, optimizer)
    for parameter in rest:
        parameter.requires_grad_(False)
    losses = []
    for step in range(STEPS):
        if step == UNFROZEN_AT:
            assert len(optimizer.state_dict()["state"]) == len(head)
            for parameter in rest:
                parameter.requires_grad_(True)
        torch.manual_seed(step)
        loss = model(batch(step)).float().square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected_losses, expected = train_plain(precision)
    assert losses == expected_losses
    found = masters(model)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value.float())] == []
    assert len(optimizer.state_dict()["state"]) == len(head) + len(rest)


def test_adding_what_was_frozen_when_boosted_is_refused_with_the_way_out() -> None:
    model: Any = build()
    head, rest = parts(model)
    for parameter in rest:
        parameter.requires_grad_(False)
    model, optimizer, *_ = Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, HybridAdam(head))
    for parameter in rest:
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias, .*freeze them after booster\.boost"):
        optimizer.add_param_group({"params": rest})
    assert len(optimizer.param_groups) == 1


def test_adding_what_another_group_has_is_refused_as_torch_does() -> None:
    model: Any = build()
    model, optimizer, *_ = Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, HybridAdam(model.parameters()))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[0].weight]})
    assert len(optimizer.param_groups) == 1
