"""What some ranks have saved, others go on with, as many or more or fewer, to the bits of a run that never stopped."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_training import TIERS, Ended, Training, Where, assert_same, flat
from world import Worlds

from gemini.errors import CheckpointError, RankError

STEPS = 4
HALF = 2
SAMPLES = [torch.tensor(float(index)) for index in range(32)]
BATCH = 2


def straight() -> Ended:
    """The run that never stopped."""
    return Training(Where.PLAIN, steps=STEPS).train()


def parts_of(training: Training) -> dict[str, Any]:
    loader = training.booster.plugin.prepare_dataloader(SAMPLES, BATCH, shuffle=True)
    return {"model": training.model, "optimizer": training.optimizer, "dataloader": loader}


def go_on(folder: str, since: int, until: int, plugin: dict[str, Any]) -> tuple[Ended, list[float]]:
    """Load, train, and save; what it ends with, and the samples that the loader has given all ranks."""
    training = Training(Where.RANKS, **plugin)
    parts = parts_of(training)
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    if since:
        assert training.booster.load(folder, **parts) == {"step": since}
    seen: list[float] = []
    for step, batch in zip(range(since, until), parts["dataloader"], strict=False):
        training.accumulate(step)
        training.update()
        seen += batch.tolist()
    path = training.booster.save(folder, **parts, extra={"step": until})
    assert (path / "manifest.json").exists(), "no rank returns before the first one has committed"
    return training.end(), seen


@pytest.mark.parametrize(
    "worlds_in_turn",
    [
        (2, 1),
        *[pytest.param(counts, marks=pytest.mark.heavy) for counts in [(1, 2), (4, 2), (2, 4), (2, 1, 4), (4, 1, 2)]],
    ],
)
def test_another_number_of_ranks_goes_on(worlds_in_turn: tuple[int, ...], worlds: Worlds, tmp_path: Path) -> None:
    (want,) = worlds(1).run(straight)
    bounds = [round(STEPS * index / len(worlds_in_turn)) for index in range(len(worlds_in_turn) + 1)]
    samples: list[float] = []
    for count, tiers, since, until in zip(
        worlds_in_turn, ("streamed", "resident", "streamed"), bounds, bounds[1:], strict=False
    ):
        ended = worlds(count).run(go_on, str(tmp_path), since, until, TIERS[tiers])
        assert sorted(each.name for each in tmp_path.glob("checkpoint-*/rng-*"))
        samples += [sample for _, seen in ended for sample in seen]
    for last, _ in ended:
        assert_same(last.weights, want.weights)
        assert_same(flat(last.states), flat(want.states))
    assert len(set(samples)) == len(samples)  # no sample of the epoch twice


@pytest.mark.heavy
def test_a_model_and_an_optimizer_saved_by_themselves_are_gone_on_with(worlds: Worlds, tmp_path: Path) -> None:
    (want,) = worlds(1).run(straight)
    worlds(2).run(first_half, str(tmp_path))
    (ended,) = worlds(1).run(second_half, str(tmp_path))
    assert_same(ended.weights, want.weights)
    assert_same(flat(ended.states), flat(want.states))


def first_half(folder: str) -> None:
    training = Training(Where.RANKS, steps=HALF, **TIERS["streamed"])
    training.train()
    training.booster.save_model(training.model, folder)
    training.booster.save_optimizer(training.optimizer, folder)
    assert list(Path(folder).glob("model*.safetensors")), "no rank returns before all have written"


def second_half(folder: str) -> Ended:
    training = Training(Where.RANKS, **TIERS["resident"])
    training.booster.load_model(training.model, folder)
    training.booster.load_optimizer(training.optimizer, folder)
    for step in range(HALF, STEPS):
        training.accumulate(step)
        training.update()
    return training.end()


class Loader:
    """A loader whose state one rank cannot save."""

    def state_dict(self) -> dict[str, Any]:
        return {"state": object() if dist.get_rank() == 1 else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def fail(folder: str) -> list[str]:
    """What each attempt says on this rank; in the end a save that works."""
    training = Training(Where.RANKS, **TIERS["resident"])
    model, save = training.model, training.booster.save
    said = []
    for broken in ({"dataloader": Loader()}, {"extra": object() if dist.get_rank() == 0 else None}):
        try:
            save(folder, model=model, **broken)
        except (CheckpointError, RankError) as error:
            said.append(f"{type(error).__name__}: {error}")
    before = os.listdir(folder) if os.path.isdir(folder) else []
    rng = torch.get_rng_state()
    drawn = torch.rand(1)
    torch.set_rng_state(rng)
    save(folder, model=model)
    torch.manual_seed(7)
    training.booster.load(folder, model=model)
    assert torch.equal(torch.rand(1), drawn)
    save(folder, model=model)
    for other in ("none", "checkpoint-000001"):
        try:
            training.booster.load(folder if dist.get_rank() == 0 else f"{folder}/{other}", model=model)
        except (CheckpointError, RankError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return [*said, str(before)]


def test_what_fails_on_one_rank_fails_on_all_and_each_has_its_own_random_numbers(
    worlds: Worlds, tmp_path: Path
) -> None:
    first, second = worlds(2).run(fail, str(tmp_path / "folder"))
    assert "RankError: rank 1 failed in booster.save" in first[0]
    assert "CheckpointError: the state of the dataloader['state'] is of type object" in second[0]
    assert "CheckpointError: extra is of type object" in first[1]
    assert "RankError: rank 0 failed in booster.save" in second[1]
    assert "RankError: rank 1 failed in the check of booster.load: CheckpointError" in first[2]
    assert "there is no such folder" in second[2]
    assert "RankError: the ranks have found different checkpoints, and none was loaded: rank 0:" in first[3]
    assert first[3] == second[3]
    assert first[4] == second[4] == "[]"
