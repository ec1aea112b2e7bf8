"""One rank runs out of memory: training goes on with right numbers, or all ranks are told."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_training import Ended, Training, Where, assert_same, flat
from torch import Tensor
from world import Worlds

from gemini.errors import OutOfMemory, RankError


class Short(Training):
    """Rank 1 lacks memory once: in a forward, which its user repeats, or in a backward, whose step all repeat."""

    place = "forward"
    told = ""

    def micro_step(self, number: int) -> None:
        is_short = self.rank == 1 and number == 1 and not self.told
        if not is_short:
            super().micro_step(number)
            return
        self.told = "raised"

        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError("out of memory")

        hook = self.model[2].register_forward_pre_hook(fail) if self.place == "forward" else None
        torch.manual_seed(number)
        with pytest.raises(OutOfMemory):
            loss = self.loss(number)
            self.backward(loss * _Fails.apply(loss))
        if hook is not None:
            hook.remove()
            super().micro_step(number)

    def update(self) -> None:
        try:
            super().update()
        except RankError as error:
            assert "a backward failed on rank 1" in str(error)
            self.accumulate(0)
            super().update()


class InBackward(Short):
    place = "backward"


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return torch.ones_like(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")


def short(kind: type[Short]) -> Ended:
    return kind(Where.RANKS).train()


def alone() -> Ended:
    return Training(Where.PLAIN).train()


def boost_with(host_memory: list[str]) -> None:
    Training(Where.RANKS, host_memory=host_memory[dist.get_rank()])


@pytest.mark.parametrize("kind", [Short, InBackward])
def test_a_rank_that_runs_out_of_memory_once_costs_no_bit(kind: type[Short], worlds: Worlds) -> None:
    [want] = worlds(1).run(alone)
    for ended in worlds(2).run(short, kind, seconds=30):
        assert_same(ended.weights, want.weights)
        assert_same(flat(ended.states), flat(want.states))


def test_a_rank_with_too_little_memory_for_its_part_is_told_to_all(worlds: Worlds) -> None:
    outcomes = worlds(2).outcomes(boost_with, ["64MiB", "20KiB"], seconds=30)
    assert all("OutOfMemory" in outcome.error for outcome in outcomes), outcomes
