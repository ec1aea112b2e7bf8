"""What some ranks have saved, others go on with, as many or more or fewer, to the bits of a run that never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_training import TIERS, Ended, Training, Where, assert_same, flat
from world import Worlds

STEPS = 4
HALF = 2


def straight() -> Ended:
    """The run that never stopped."""
    return Training(Where.PLAIN, steps=STEPS).train()


def first_half(folder: str, plugin: dict[str, Any]) -> None:
    training = Training(Where.RANKS, steps=HALF, **plugin)
    training.train()
    training.booster.save_model(training.model, folder)
    training.booster.save_optimizer(training.optimizer, folder)
    name = "model.safetensors" if dist.get_world_size() == 1 else "model.safetensors.index.json"
    assert Path(folder, name).exists(), "no rank returns before all have written"


def second_half(folder: str, plugin: dict[str, Any]) -> Ended:
    training = Training(Where.RANKS, **plugin)
    training.booster.load_model(training.model, folder)
    training.booster.load_optimizer(training.optimizer, folder)
    for step in range(HALF, STEPS):
        training.accumulate(step)
        training.update()
    return training.end()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (2, 1),
        *[pytest.param(*pair, marks=pytest.mark.heavy) for pair in [(1, 2), (1, 4), (2, 4), (4, 1), (4, 2)]],
    ],
)
def test_another_number_of_ranks_goes_on(before: int, after: int, worlds: Worlds, tmp_path: Path) -> None:
    (want,) = worlds(1).run(straight)
    worlds(before).run(first_half, str(tmp_path), TIERS["streamed"])
    for ended in worlds(after).run(second_half, str(tmp_path), TIERS["resident"]):
        assert_same(ended.weights, want.weights)
        assert_same(flat(ended.states), flat(want.states))
