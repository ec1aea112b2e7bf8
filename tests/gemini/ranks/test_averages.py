"""A running average of what several ranks train has the bits of one process."""

from typing import Any

import pytest
from rank_training import TIERS, Training, check_exact
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from world import Worlds

import gemini


class Averaged(Training):
    """Its average is looked at after each step, and swapped in."""

    average: Any = None

    def begin_step(self, step: int) -> None:
        if self.average is None and self.is_managed:
            self.average = gemini.EMA(self.model, 0.9)
        elif self.average is None:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def end_step(self, step: int) -> None:
        if self.is_managed:
            self.ended.seen.append({name: value.tolist() for name, value in self.average.named_tensors()})
            with self.average.swapped_in():
                self.model.state_dict()
        else:
            self.average.update_parameters(self.model)
            averaged = self.average.module.named_parameters()
            self.ended.seen.append({name: value.detach().tolist() for name, value in averaged})


@pytest.mark.parametrize("tiers", ["resident", "streamed"])
def test_ranks_average_bit_for_bit(tiers: str, worlds: Worlds) -> None:
    check_exact(worlds(2), Averaged, **TIERS[tiers])
