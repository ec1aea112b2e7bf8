"""Models that do unusual things with their parameters, under the smallest device that can run them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd_models import WIDTH, ScalesInPlace, batches
from odd_models import mean_square as loss
from parity import Task, check_parity, tightest
from torch import Tensor, nn
from torch.nn import functional


class UsesOthersWeights(nn.Module):
    """Parameters are used outside of their own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.gelu(self.a(x)), self.b.weight, self.a.bias) * self.scale


class RootUsesOthersWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([UsesOthersWeights() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = functional.linear(block(x), block.b.weight)
        return x


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(torch.relu(self.a(torch.relu(self.b(x))))))  # type: ignore[no-any-return]


class AlternatingExperts(nn.Module):
    """Which parameters are unused changes from step to step; torch does not touch those."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for expert in ((0, 1), (2, 3), (1, 2), (0, 3))[self.calls % 4]:
            x = torch.tanh(self.experts[expert](x))
        return x


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wrapped = Wrapped(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        output = self.wrapped(x)
        return self.outer(output["y"]) + output["passed"][0]  # type: ignore[no-any-return]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.inner(x) + self.shift, "passed": [x]}


class BareParametersOnTheRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 8, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.layer(x + self.position[:, : x.shape[1]])  # type: ignore[no-any-return]


class SideOutput(nn.Module):
    """A second path to the loss leaves through an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)]) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        side = []
        for main, gate in self.blocks:
            side.append(gate(x).square().mean())
            x = torch.relu(main(x))
        return x.square().mean() + sum(side)  # type: ignore[no-any-return]


class ViewOutlivesItsUse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        transposed = self.table.weight.t()
        return self.layer(x) @ transposed  # type: ignore[no-any-return]


class OddDtypesAndShapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.wide * self.scalar + self.empty.sum()  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))  # type: ignore[no-any-return]


def convolutions() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3))
    return nn.Sequential(nn.Unflatten(0, (4, 1)), layers.to(memory_format=torch.channels_last))


def normalised() -> nn.Module:
    weight_norm, spectral_norm = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    return nn.Sequential(weight_norm(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), spectral_norm(nn.Linear(WIDTH, WIDTH)))


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    model[0].requires_grad_(False)
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


MODELS: list[Callable[[], nn.Module]] = [
    AlternatingExperts, BareParametersOnTheRoot, CalledTwice, DictOutput, OddDtypesAndShapes, Recurrent,
    RootUsesOthersWeights, SideOutput, Tied, UsesOthersWeights, ViewOutlivesItsUse,
    convolutions, encoder, normalised, partly_frozen,
    lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), ScalesInPlace(), nn.Linear(WIDTH, WIDTH)),
]  # fmt: skip
NAMES = [getattr(m, "__name__", "model").replace("<lambda>", "in_place_module") for m in MODELS]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("build", MODELS, ids=NAMES)
def test_an_unusual_model_trains_as_without_management(build: Callable[[], nn.Module], tmp_path: Any) -> None:
    task = Task(build, batches(8 if build is AlternatingExperts else 4), loss)
    small = {"chunk_config_dict": {1: {"chunk_size": 256}}}
    check_parity(task, host_memory="420KiB", offload_dir=tmp_path, **small)
    for prefetch in ({}, {"max_prefetch": 0}):
        # Every error names a capacity; following them leads to the smallest that works, where almost nothing stays.
        capacity = tightest(task, "device", **prefetch, **small)
        check_parity(task, device_memory=capacity, **prefetch, **small)
