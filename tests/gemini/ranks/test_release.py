"""Several ranks give the memory of their parts back between two steps, and take it again."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_training import TIERS, Training, Where, check_exact
from world import Worlds

import gemini
from gemini.boosted import boosted
from gemini.chunk import Tier
from gemini.errors import RankError


class Released(Training):
    """Released after each step; read while it is."""

    def end_step(self, step: int) -> None:
        if self.is_managed:
            with tempfile.TemporaryDirectory() as folder:
                self.booster.release(self.model, folder)
                homes = [home for chunk in boosted(self.model).manager.chunks for home in chunk.homes.values()]
                assert {home.tier for home in homes} == {Tier.DISK}
                weight = self.model.state_dict()["0.weight"]
                self.booster.resume(self.model)
        else:
            weight = self.model.state_dict()["0.weight"]
        self.ended.seen.append(weight.tolist())


@pytest.mark.parametrize("tiers", ["resident", "streamed"])
def test_ranks_train_on_bit_for_bit(tiers: str, worlds: Worlds) -> None:
    check_exact(worlds(2), Released, **TIERS[tiers])


def test_a_missing_folder_on_one_rank_refuses_it_on_all_and_training_goes_on(worlds: Worlds, tmp_path: Path) -> None:
    assert worlds(2).run(refused, str(tmp_path)) == ["ValueError", "RankError"]


def refused(folder: str) -> str:
    training = Training(Where.RANKS, **TIERS["resident"])
    training.train()
    try:
        training.booster.release(training.model, folder if training.rank else None)
    except (ValueError, RankError) as error:
        training.train()
        return type(error).__name__
    return "released"


def made_plain(plugin: dict[str, Any]) -> bool:
    training = Training(Where.RANKS, **plugin)
    training.train()
    expected = training.model.state_dict()
    plain = gemini.to_torch(training.model)
    return all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("tiers", ["resident", "streamed"])
def test_each_rank_gets_the_whole_plain_model(tiers: str, worlds: Worlds) -> None:
    assert worlds(2).run(made_plain, TIERS[tiers]) == [True, True]
