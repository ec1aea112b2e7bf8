"""Both sides of a soak: plain PyTorch, and ours. What happens is in `Side`; how it is done differs."""

import os
import shutil
import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin

from .events import Event, chosen

WIDTH, LAYERS, WORDS = 256, 6, 200
_CHUNK = {"chunk_config_dict": {1: {"chunk_size": 1 << 17}}}
_HOMES = 12 * (WIDTH * WIDTH + 3 * WIDTH) * LAYERS
PLACEMENTS: dict[str, dict[str, Any]] = {
    "in RAM": {"host_memory": "64MiB"},
    "streamed": {"device_memory": "2MiB", "host_memory": "64MiB", **_CHUNK},
    "on disk": {"host_memory": "4MiB", "offload_dir": "disk", **_CHUNK},
    "on disk, activations too": {
        "host_memory": "4MiB",
        "offload_dir": "disk",
        "activation_policy": "offload",
        **_CHUNK,
    },
    "recomputed": {"host_memory": "64MiB", "activation_policy": "recompute"},
}
BUDGETS = ("4MiB", "6MiB", "9MiB", "64MiB")
"""What `booster.resize` sets, of RAM. Those without a disk tier take the last one only."""


class Injected(Exception):
    """An error of the user's own code."""


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, is_interrupt: bool) -> Tensor:
        ctx.is_interrupt = is_interrupt
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _fail(ctx.is_interrupt)
        return gradients[0], None


def _fail(is_interrupt: bool) -> None:
    if is_interrupt:
        signal.raise_signal(signal.SIGINT)
        for _ in range(100):  # the handler runs between two instructions
            os.getpid()
    raise Injected("on purpose")


class Fault(nn.Module):
    """Does nothing, unless it is told to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.kind.endswith("forward") or self.kind == "forward_error":
            _fail(self.kind.startswith("interrupt"))
        if self.kind.endswith("backward") or self.kind == "backward_error":
            failed: Tensor = _FailsInBackward.apply(x, self.kind.startswith("interrupt"))
            return failed
        return x


class Model(nn.Module):
    """Words, a stack of layers with dropout and a fault in its middle, and batch norm for a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.fault = Fault()
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1)) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for number, layer in enumerate(self.layers):
            x = x + layer(x)
            if number == LAYERS // 2:
                x = self.fault(x)
        scores = self.head(self.norm(x.flatten(0, 1)))
        return nn.functional.cross_entropy(scores, words.flatten())


class Side(ABC):
    """A training to which events happen. Each gives a number that must be the same on both sides."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        self._old_folders: list[Path] = []
        self.model: Any = None
        self.optimizer: Any = None
        self.has_saved = False
        self.build(Event(0, "rebuild", 1, 4, 0.0))

    def happen(self, event: Event) -> float:
        """Let it happen, with random numbers of its own."""
        torch.manual_seed(event.number)
        value: float = getattr(self, event.kind)(event)
        return value

    # -- what happens

    def train(self, event: Event) -> float:
        loss = self._loss(event, self.model)
        self._backward(loss, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def accumulate(self, event: Event) -> float:
        total = 0.0
        for _ in range(2):
            loss = self._loss(event, self.model)
            self._backward(loss, self.optimizer)
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def evaluate(self, event: Event) -> float:
        self.model.eval()
        with torch.no_grad():
            loss = self._loss(event, self.model)
        self.model.train()
        return float(loss)

    def forward_error(self, event: Event) -> float:
        return self._fails(event, Injected)

    def backward_error(self, event: Event) -> float:
        return self._fails(event, Injected)

    def interrupt_forward(self, event: Event) -> float:
        return self._fails(event, KeyboardInterrupt)

    def interrupt_backward(self, event: Event) -> float:
        return self._fails(event, KeyboardInterrupt)

    def _fails(self, event: Event, expected: type[BaseException]) -> float:
        self.model.fault.kind = event.kind
        loss = 0.0
        try:
            made = self._loss(event, self.model)
            loss = float(made.detach())
            self._backward(made, self.optimizer)
        except expected:
            pass
        else:
            raise AssertionError(f"{event.kind} did not happen")
        finally:
            self.model.fault.kind = ""
        self.optimizer.zero_grad()
        return loss

    def save(self, event: Event) -> float:
        self.has_saved = True
        self._save(in_background=False)
        return 0.0

    def save_async(self, event: Event) -> float:
        self.has_saved = True
        self._save(in_background=True)
        return self.train(event)  # while it is being written

    def load(self, event: Event) -> float:
        if self.has_saved:
            self._load()
        return self.evaluate(event)

    def rebuild(self, event: Event) -> float:
        self.model = self.optimizer = None
        # A save may still be under way: the model before this one has its folder until the next one goes.
        self._old_folders.append(self.checkpoints)
        for folder in self._old_folders[:-1]:
            shutil.rmtree(folder, ignore_errors=True)
        self.checkpoints = self._folder / f"checkpoints-{event.number}"
        self.checkpoints.mkdir()
        self.has_saved = False
        self.build(event)
        return self.evaluate(event)

    def second_model(self, event: Event) -> float:
        """Another one is made beside it, takes a step and goes."""
        mine = self.model, self.optimizer
        try:
            self.build(event)
            return self.train(event)
        finally:
            self.model, self.optimizer = mine

    def read(self, event: Event) -> float:
        parameter = chosen(event, list(self.model.parameters()))
        return float(parameter.detach().double().sum())

    def write(self, event: Event) -> float:
        parameter = chosen(event, list(self.model.parameters()))
        with torch.no_grad():
            parameter.mul_(0.99)
            parameter.data.add_(1e-3)
        return float(parameter.detach().double().sum())

    # -- how

    def build(self, event: Event) -> None:
        """A new model with its optimizer."""
        torch.manual_seed(event.number)
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)

    @abstractmethod
    def resize(self, event: Event) -> float:
        """Other budgets from now on."""

    @abstractmethod
    def _backward(self, loss: Tensor, optimizer: Any) -> None: ...

    @abstractmethod
    def _save(self, *, in_background: bool) -> None: ...

    @abstractmethod
    def _load(self) -> None: ...

    def _loss(self, event: Event, model: Any) -> Tensor:
        generator = torch.Generator().manual_seed(event.number)
        loss: Tensor = model(torch.randint(0, WORDS, (event.rows, event.length), generator=generator))
        return loss


class Plain(Side):
    """PyTorch and nothing else."""

    def resize(self, event: Event) -> float:
        return 0.0

    def _backward(self, loss: Tensor, optimizer: Any) -> None:
        loss.backward()

    def _save(self, *, in_background: bool) -> None:
        torch.save((self.model.state_dict(), self.optimizer.state_dict()), self.checkpoints / "saved.pt")

    def _load(self) -> None:
        of_model, of_optimizer = torch.load(self.checkpoints / "saved.pt")
        self.model.load_state_dict(of_model)
        self.optimizer.load_state_dict(of_optimizer)


class Ours(Side):
    """The same under management, each new model with the placement that its event has chosen."""

    def __init__(self, folder: Path) -> None:
        self.placement = ""
        self.booster: Any = None
        super().__init__(folder)

    def build(self, event: Event) -> None:
        super().build(event)
        self.placement = chosen(event, list(PLACEMENTS))
        options = dict(PLACEMENTS[self.placement])
        if "offload_dir" in options:
            options["offload_dir"] = str(self._folder / "disk")
        self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **options))
        self.model, self.optimizer, *_ = self.booster.boost(self.model, self.optimizer)

    def second_model(self, event: Event) -> float:
        mine = self.placement, self.booster
        try:
            return super().second_model(event)
        finally:
            self.placement, self.booster = mine

    def resize(self, event: Event) -> float:
        has_disk = "offload_dir" in PLACEMENTS[self.placement]
        self.booster.resize(self.model, host_memory=chosen(event, BUDGETS) if has_disk else BUDGETS[-1])
        return 0.0

    def rest(self) -> int:
        """Wait for all that goes on in the background; the bytes of RAM that our ledger counts then."""
        self.booster.wait_until_finished()
        state = boosted(self.model)
        state.manager.settle()
        state.saving.rest(10.0)
        return state.manager.ledger.ram_bytes

    def _backward(self, loss: Tensor, optimizer: Any) -> None:
        self.booster.backward(loss, optimizer)

    def _save(self, *, in_background: bool) -> None:
        self.booster.save(self.checkpoints, model=self.model, optimizer=self.optimizer, keep=1, use_async=in_background)

    def _load(self) -> None:
        self.booster.load(self.checkpoints, model=self.model, optimizer=self.optimizer, rng=False)
