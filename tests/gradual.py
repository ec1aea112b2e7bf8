"""Trainings that unfreeze layers one after the other, with and without management."""

from collections.abc import Callable
from typing import Any

import torch
from loop import PLACEMENTS, batch, build
from parity import masters
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

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


def optimizer_of(kind: str) -> Callable[[Any], Any]:
    return {
        "adam": lambda groups: HybridAdam(groups, **OPTIONS),
        "bf16 states": lambda groups: HybridAdam(groups, **OPTIONS, states="bf16"),
        "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2, initial_accumulator_value=0.5),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
        "plain sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    }[kind]


def stages(model: Any) -> list[list[nn.Parameter]]:
    """Layers from the last to the first, two at a time: what is unfrozen at a time."""
    layers = [module for module in model if list(module.parameters())]
    return [[p for layer in layers[i : i + 2] for p in layer.parameters()] for i in range(len(layers) - 2, -1, -2)]


class Gradual:
    """Unfreezes a stage every two steps, each in a group with a learning rate of its own."""

    def __init__(self, kind: str, precision: str, plugin: dict[str, Any] | None, in_group: bool = False) -> None:
        model: Any = rounded(precision)
        if plugin is None:
            model = model.to(DTYPES[precision])
        self.stages = stages(model)
        for stage in self.stages[1:]:
            for parameter in stage:
                parameter.requires_grad_(False)
        groups = [{"params": self.stages[0]}]
        if in_group:
            groups += [{"params": stage, "lr": self.rate(i)} for i, stage in enumerate(self.stages) if i]
        optimizer: Any = optimizer_of(kind)(groups)
        self.booster = None
        self.in_group = in_group
        if plugin is not None:
            self.booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **plugin))
            model, optimizer, *_ = self.booster.boost(model, optimizer)
        self.model, self.optimizer, self.dtype = model, optimizer, DTYPES[precision]

    @staticmethod
    def rate(stage: int) -> float:
        return 1e-2 / (stage + 1)

    def unfreeze(self, stage: int) -> None:
        for parameter in self.stages[stage]:
            parameter.requires_grad_(True)
        if not self.in_group:
            self.optimizer.add_param_group({"params": self.stages[stage], "lr": self.rate(stage)})

    def backward(self, step: int) -> float:
        torch.manual_seed(step)
        loss = self.model(batch(step).to(self.dtype)).float().square().mean()
        if self.booster is not None:
            self.booster.backward(loss, self.optimizer)
        else:
            loss.backward()
        return loss.item()

    def step(self, step: int) -> float:
        loss = self.backward(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def train(self) -> list[float]:
        losses = []
        for step in range(2 * len(self.stages)):
            if step and step % 2 == 0:
                self.unfreeze(step // 2)
            losses.append(self.step(step))
        return losses

    def weights(self) -> dict[str, Tensor]:
        if self.booster is not None:
            return {name: value.float() for name, value in masters(self.model).items()}
        state = self.optimizer.state
        return {n: state.get(p, {}).get("master", p).detach().float() for n, p in self.model.named_parameters()}


def check_same(ours: Gradual, plain: Gradual) -> None:
    found = ours.weights()
    assert [name for name, value in plain.weights().items() if not torch.equal(found[name], value)] == []


PLUGINS: dict[str, dict[str, Any]] = {
    "resident": {},
    "one chunk": {"chunk_config_dict": {1: {"chunk_size": 1 << 20}}},
    "streamed": PLACEMENTS["streamed"],
    "an emulated device": {"device_memory": "2MiB"},
    "disk": {**PLACEMENTS["disk"], "host_memory": "400KiB"},
}
