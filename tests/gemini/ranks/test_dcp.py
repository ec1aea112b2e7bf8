"""What some ranks have saved for `torch.distributed.checkpoint`, others go on with, to the bits of a straight run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_training import SMALL, TIERS, Ended, Training, Where, assert_same, flat
from tensor_parallel_training import TensorParallel
from torch import Tensor, nn
from world import Worlds

from gemini.checkpoint import dcp
from gemini.nn.optimizer import HybridAdam

STEPS = 4
HALF = 2


class Odd(nn.Module):
    """Tied, frozen and never used parameters, one that is not in rows, one without elements, and buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, track_running_stats=False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))
        self.turned = nn.Parameter(torch.randn(width, 3, width).permute(2, 0, 1))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.unused = nn.Linear(7, 5)
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.last = nn.Linear(width, width, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)) * self.scale.to(x.dtype)
        x = torch.einsum("bi,ijk->bj", x, self.turned)
        return self.last(self.frozen(x))


class OddTraining(Training):
    width = 24

    def build(self) -> nn.Module:
        return Odd(self.width)


class Bf16(OddTraining):
    precision = "bf16"


class Bf16States(Bf16):
    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam(model.parameters(), lr=1e-2, states="bf16")


class EightBit(Bf16):
    def make_optimizer(self, model: nn.Module) -> Any:
        return HybridAdam(model.parameters(), lr=1e-2, states="8bit")


class Momentum(OddTraining):
    def make_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


KINDS = {kind.__name__: kind for kind in (OddTraining, Bf16, Bf16States, EightBit, Momentum)}


def straight(kind: str, plugin: dict[str, Any]) -> Ended:
    """The run that never stopped: one process with all micro-batches."""
    return KINDS[kind](Where.ALONE, steps=STEPS, **plugin).train()


def first_half(kind: str, folder: str, plugin: dict[str, Any]) -> None:
    training = KINDS[kind](Where.RANKS, steps=HALF, **plugin)
    training.train()
    path = training.booster.save(folder, model=training.model, optimizer=training.optimizer, layout="dcp")
    assert Path(path, ".metadata").exists(), "no rank returns before the checkpoint is there"


def second_half(kind: str, folder: str, plugin: dict[str, Any]) -> Ended:
    training = KINDS[kind](Where.RANKS, **plugin)
    training.booster.load(folder, model=training.model, optimizer=training.optimizer)
    for step in range(HALF, STEPS):
        training.accumulate(step)
        training.update()
    return training.end()


SPLIT = {"split_master": True, **SMALL}


@pytest.mark.parametrize(
    ("before", "after", "kind", "saving", "loading"),
    [
        (2, 1, "OddTraining", TIERS["streamed"], TIERS["resident"]),
        (1, 2, "EightBit", {}, SMALL),
        pytest.param(2, 1, "Momentum", TIERS["disk"], {}, marks=pytest.mark.heavy),
        pytest.param(2, 4, "Bf16", SPLIT, {}, marks=pytest.mark.heavy),
        pytest.param(4, 2, "Bf16", {}, SPLIT, marks=pytest.mark.heavy),
        pytest.param(2, 1, "Bf16States", SMALL, {}, marks=pytest.mark.heavy),
        pytest.param(4, 1, "EightBit", SMALL, {}, marks=pytest.mark.heavy),
        pytest.param(4, 2, "OddTraining", {"hybrid_shard_size": 2, **SMALL}, {}, marks=pytest.mark.heavy),
        pytest.param(1, 4, "OddTraining", {}, {"hybrid_shard_size": 2, **SMALL}, marks=pytest.mark.heavy),
    ],
)
def test_another_number_of_ranks_goes_on(
    before: int, after: int, kind: str, saving: dict[str, Any], loading: dict[str, Any], worlds: Worlds, tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoint")
    (want,) = worlds(1).run(straight, kind, {})
    worlds(before).run(first_half, kind, folder, saving)
    for ended in worlds(after).run(second_half, kind, folder, loading):
        assert_same(ended.weights, want.weights)
        assert_same(flat(ended.states), flat(want.states))


def tensor_parallel(dp: int, steps: int) -> TensorParallel:
    return type("Cut", (TensorParallel,), {"dp": dp, "steps": steps})(Where.RANKS, **SMALL)


def first_half_in_parts(folder: str, dp: int) -> dict[str, Tensor]:
    """Returns the weights of a run that goes on."""
    training = tensor_parallel(dp, HALF)
    training.train()
    dcp.save(folder, training.model, training.optimizer)
    for step in range(HALF, STEPS):
        training.accumulate(step)
        training.update()
    return training.end().weights


def second_half_in_parts(folder: str, dp: int) -> dict[str, Tensor]:
    training = tensor_parallel(dp, STEPS)
    dcp.load(folder, training.model, training.optimizer)
    for step in range(HALF, STEPS):
        training.accumulate(step)
        training.update()
    return training.end().weights


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 2), (1, 2)),
        *(pytest.param(*each, marks=pytest.mark.heavy) for each in [((2, 4), (1, 2)), ((1, 2), (2, 4))]),
    ],
)
def test_tensor_parallel_models_go_on_with_another_number_of_rows(
    before: tuple[int, int], after: tuple[int, int], worlds: Worlds, tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoint")
    (dp, size), (new_dp, new_size) = before, after
    want = worlds(size).run(first_half_in_parts, folder, dp)
    for weights in worlds(new_size).run(second_half_in_parts, folder, new_dp):
        assert_same(weights, want[0])
