"""What the tests of ``update_in_backward=True`` train."""

from typing import Any

import pytest
import torch
from loop import PLACEMENTS, SMALL, Trained
from torch import nn

from gemini.boosted import boosted

STEPS = 4
BACKWARD_PLACEMENTS: dict[str, dict[str, Any]] = {
    **PLACEMENTS,
    "resident": SMALL,
    "disk, but gradients": {**PLACEMENTS["disk"], "host_memory": "420KiB"},
}
BY_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}

everywhere = pytest.mark.parametrize("backward_placement", BACKWARD_PLACEMENTS, indirect=True)


class Run(Trained):
    """Without dropout, so that two of them can take turns."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(m for m in super().build_model() if not isinstance(m, nn.Dropout)))


def in_backward(placement: dict[str, Any], precision: str = "fp32") -> Run:
    return Run(placement, precision, update_in_backward=True)


def updates_of(model: nn.Module) -> Any:
    return boosted(model).engine.updates.schedule


def trainable(model: nn.Module) -> int:
    return sum(chunk.is_trainable for chunk in boosted(model).manager.chunks)


def parameters_of(run: Trained) -> list[nn.Parameter]:
    return [binding.parameter for chunk in boosted(run.model).manager.chunks for binding in chunk.bindings]  # type: ignore[misc]
