"""A model in training, as uses get it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from outside.models import Model
from outside.placements import Placement
from torch import Tensor, nn

from gemini.booster import Booster


class Training:
    """A model in training, plain or managed: what a use works on.

    Attributes
    ----------
    model, optimizer
        As `boost` returned them.
    booster
        None in plain PyTorch.
    given_optimizer, given_parameters
        From before `boost`; code of users still has them.
    batches
        How many were drawn.
    kept
        For what a use wants to keep alive until the end.
    """

    def __init__(self, kind: Model, placement: Placement | None, folder: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.model: Any = kind.build()
        self.given_parameters = list(self.model.parameters())
        self.given_optimizer = kind.optimizer([p for p in self.given_parameters if p.requires_grad])
        self.optimizer: Any = self.given_optimizer
        self.booster: Booster | None = None
        self.device = "cpu"
        self.folder = folder
        if placement is not None:
            self.device = placement.device
            self.booster = Booster(plugin=placement.plugin(self.model, folder))
            self.model, self.optimizer, *_ = self.booster.boost(self.model, self.optimizer)
        self.losses: list[float] = []
        self.kept: list[Any] = []
        self.batches = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def layers(self) -> list[nn.Module]:
        """The innermost modules that have parameters."""
        return [module for module in self.model.modules() if any(True for _ in module.parameters(recurse=False))]

    def batch(self) -> Tensor:
        """The next batch; the same one in every run."""
        self.batches += 1
        return self.kind.batch(torch.Generator().manual_seed(self.batches)).to(self.device)

    def loss(self) -> Tensor:
        loss = self.kind.loss(self.model, self.batch())
        self.losses.append(loss.item())
        return loss

    def backward(self, loss: Tensor | None = None) -> Tensor:
        """Compute the next loss if there is none, and its gradients."""
        loss = self.loss() if loss is None else loss
        if self.booster is None:
            loss.backward()
        else:
            self.booster.backward(loss, self.optimizer)
        return loss

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def unmanaged(self, seed: int = 3) -> Any:
        """A second model of the same kind, with other weights, that nobody manages."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.kind.build()


def in_another_thread(function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns, or raise what it raises, in a thread of its own; a minute is enough."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)
