"""One small training loop, with and without management, for tests of its habits and accidents."""

from typing import Any

import torch
from parity import check_at_rest, masters
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

WIDTH = 64
SMALL = {"chunk_config_dict": {1: {"chunk_size": 1024}}}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "36KiB", **SMALL},
    "disk": {"host_memory": "300KiB", "offload_dir": "disk", **SMALL},
}


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(5) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8))


def batch(step: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))


class Trained:
    """The same loop with and without management."""

    def __init__(self, placement: dict[str, Any] | None, precision: str = "fp32", **plugin: Any) -> None:
        model: Any = self.build_model()
        self.is_managed = placement is not None
        self.optimizer: Any = self.make_optimizer(model)
        self.model: Any = model
        if placement is not None:
            self.booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **placement, **plugin))
            self.model, self.optimizer, *_ = self.booster.boost(model, self.optimizer)
        torch.manual_seed(7)

    def build_model(self) -> nn.Module:
        return build()

    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)

    def loss(self, step: int) -> Tensor:
        return self.model(batch(step)).square().mean()  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        if self.is_managed:
            self.booster.backward(loss, self.optimizer)
        else:
            loss.backward()

    def step(self, number: int) -> float:
        loss = self.loss(number)
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        if self.is_managed:
            return masters(self.model)
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def check_same(ours: Trained, plain: Trained) -> None:
    check_at_rest(ours.model)
    theirs = plain.weights()
    assert not [name for name, value in ours.weights().items() if not torch.equal(value, theirs[name])]
