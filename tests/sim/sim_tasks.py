"""What is trained on the simulated device, and where its model data lie."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from loop import SMALL as LOOP_SMALL
from loop import Trained, batch, build
from parity import Run, Task, run_plain
from torch import Tensor, nn

SEED = int(os.environ.get("GEMINI_MEMORY_SIM_SEED", "0"))
"""Another order of streams in all tests that don't choose one themselves."""

WIDTH, VOCABULARY, LENGTH = 64, 50, 6

SMALL = {"chunk_config_dict": {1: {"chunk_size": 4096}}}
STATIC = {"placement_policy": "static"}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "device": {},
    "mixed": {"device_memory": "400KiB", **STATIC, "offload_optim_frac": 0.0, "offload_param_frac": 0.5, **SMALL},
    "host": {"device_memory": "120KiB", **SMALL},
    "all on host": {**STATIC, "offload_optim_frac": 1.0, "offload_param_frac": 1.0, **SMALL},
    "unpinned": {"device_memory": "120KiB", "pin_memory": False, **SMALL},
    "disk": {"device_memory": "60KiB", "host_memory": "300KiB", "offload_dir": "disk", **SMALL},
}
"""Arguments of the plugin. ``offload_dir`` stands for a folder of the test's own. In "mixed" full copies with homes on
DEVICE come and go."""


def in_folder(placement: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A placement's arguments, with a folder of the test's own."""
    return {**placement, "offload_dir": folder} if "offload_dir" in placement else dict(placement)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.outer(nn.functional.gelu(self.inner(self.norm(x)))))


class Tiny(nn.Module):
    """A language model without attention; its head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))  # type: ignore[no-any-return]


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Wherever the model is."""
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, VOCABULARY, (4, LENGTH), generator=generator) for _ in range(steps)]


def task(precision: str = "bf16", steps: int = 4, **more: Any) -> Task:
    return Task(Tiny, batches(steps), loss, precision, **more)


@lru_cache
def expected(precision: str = "bf16", steps: int = 4, states: str = "fp32") -> Run:
    """The same training by plain PyTorch on the CPU."""
    return run_plain(task(precision, steps, states=states))


class OnDevice(Trained):
    """The loop of `loop.py`, wherever the model is; ``place`` says where one without management is."""

    def __init__(
        self, placement: dict[str, Any] | None, precision: str = "fp32", place: str = "cpu", **more: Any
    ) -> None:
        self._place = place if placement is None else "cpu"
        super().__init__(placement, precision, **more)

    def build_model(self) -> nn.Module:
        return build().to(self._place)

    def loss(self, step: int) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model(batch(step).to(device)).float().square().mean()  # type: ignore[no-any-return]


LOOP_PLACEMENTS: dict[str, dict[str, Any]] = {
    "device": {},
    "mixed": {"device_memory": "330KiB", **STATIC, "offload_optim_frac": 0.0, "offload_param_frac": 0.5, **LOOP_SMALL},
    "host": {"device_memory": "36KiB", **LOOP_SMALL},
    "disk": {"device_memory": "60KiB", "host_memory": "300KiB", "offload_dir": "disk", **LOOP_SMALL},
}
