"""The ranks of tests: results, errors and deaths of each come back."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from world import RankFailed, World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(2, group_seconds=10) as world:
        yield world


def sum_of_ranks(beside: float) -> torch.Tensor:
    total = torch.tensor([float(dist.get_rank()), beside])
    dist.all_reduce(total)
    return total


def raise_on_one() -> int:
    if dist.get_rank() == 1:
        raise ValueError("one of them cannot")
    return dist.get_rank()


def die_or_wait() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_functions_run_on_all_ranks_at_once(world):
    assert [total.tolist() for total in world.run(sum_of_ranks, 3.0)] == [[1.0, 6.0]] * 2


def test_an_error_of_one_rank_comes_back_and_the_world_lives_on(world):
    one, other = world.outcomes(raise_on_one)
    assert (one.value, other.error) == (0, "ValueError: one of them cannot")
    with pytest.raises(RankFailed, match="rank 1: ValueError: one of them cannot"):
        world.run(raise_on_one)
    assert world.is_whole


def test_a_rank_that_dies_or_never_ends_is_told_of(world):  # the last test with this world
    late, dead = world.outcomes(die_or_wait, seconds=1)
    assert "did not come to an end within 1 s" in late.error
    assert "signal.pause" in late.details or "die_or_wait" in late.details  # where it was
    assert dead.error == "it died (status -9)"
    assert late.is_dead and dead.is_dead and not world.is_whole
