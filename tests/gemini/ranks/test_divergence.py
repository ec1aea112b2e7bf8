"""Ranks whose programs differ: the numbers of one process that does the same, or an error on all, never a hang."""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from forked_ranks import SECONDS, Ended, Starter, starter
from rank_oracle import expected, programs_of
from rank_programs import Training, run_operations, run_uncaught
from torch import Tensor

pytestmark = pytest.mark.timeout(4 * SECONDS)

STEP = ["forward", "backward", "step", "zero"]
DEFAULT_SEEDS = 3
HEAVY_SEEDS = 200


@pytest.fixture(name="starter")
def shared_starter() -> Starter:
    return starter()


def check(ranks: Sequence[Ended], want: dict[str, Tensor] | None) -> None:
    """See that all came to these weights; if there are none, that no rank goes on in peace but one that had ended."""
    assert [rank.status for rank in ranks] == [0] * len(ranks), [rank.log for rank in ranks]
    errors = [rank.value["errors"] for rank in ranks]
    if want is None:
        assert any(errors)
        if not all(errors):
            assert all("has ended" in text for each in errors for _, text in each)
        return
    assert not any(errors)
    for rank in ranks:
        assert not [name for name, value in want.items() if not torch.equal(rank.value["weights"][name], value)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "differing",
    [
        ["forward rows=7", *STEP[1:], *STEP],
        ["forward skipped=1", *STEP[1:], *STEP],
        ["fail_in_forward", *STEP, *STEP],
        ["fail_in_forward", *STEP[2:], *STEP],
        ["forward", "backward", *STEP, *STEP],
        ["forward", "backward", "fail_before_step", *STEP[2:], *STEP],
        ["evaluate", "forward", "read", "show", "backward", "state", "optimizer_state", *STEP[2:], *STEP],
    ],
    ids=" ".join,
)
def test_what_ranks_may_do_differently_has_the_numbers_of_one_process(
    differing: list[str], starter: Starter, tmp_path: Path
) -> None:
    programs = [[*STEP, *STEP], differing]
    want = expected(programs)
    assert want is not None
    check(starter.run(run_operations, tmp_path, programs=programs), want)


def test_rank_0_looks_at_everything_and_saves_while_others_train(starter: Starter, tmp_path: Path) -> None:
    looks = ["read", "show", "state", "optimizer_state", "evaluate", "save"]
    programs = [[*looks, "forward", *looks, "backward", *looks, "step", *looks, "zero", *looks], STEP]
    check(starter.run(run_operations, tmp_path, programs=programs), expected(programs))
    assert (tmp_path / "saved.safetensors").exists()


@pytest.mark.parametrize(
    ("attempt", "told"),
    [
        (["fail_in_backward", "step"], "a backward failed on rank 1: Injected: in backward"),
        (["fail_within_backward", "step"], "a backward failed on rank 1: Injected: in a hook"),
        (["fail_in_gradient_hook", "backward", "step"], "a backward failed on rank 1: Injected: in a hook"),
        (["backward", "zero", "backward", "step"], "dropped their gradients a different number of times (rank 0: 0"),
        (["backward", "clip"], "rank 1: clip_grad_by_norm(0.01"),
    ],
    ids=str,
)
def test_after_an_error_that_all_are_told_training_goes_on_with_right_numbers(
    attempt: list[str], told: str, starter: Starter, tmp_path: Path
) -> None:
    programs = [[*STEP, *STEP], [*attempt, "zero", *STEP]]
    ranks = starter.run(run_operations, tmp_path, programs=programs, goes_on=True)
    assert [rank.status for rank in ranks] == [0, 0], [rank.log for rank in ranks]
    alone = Training(ranks=2)
    for index, rank in enumerate(ranks):
        ((_, text),) = rank.value["errors"]
        assert told in text
        alone.accumulate((len(rank.value["losses"]) - 1) * 2 + index, "forward")
    alone.step()
    for rank in ranks:
        assert not [n for n, value in alone.weights().items() if not torch.equal(rank.value["weights"][n], value)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("programs", "told"),
    [
        (
            ([*STEP, *STEP], STEP),
            "rank 1 has ended (its program has ended), and this rank is at optimizer.step() number 2",
        ),
        (([*STEP, "forward", "backward", *STEP], [*STEP, "raise_error"]), "ended with Injected: in the middle"),
        (([*STEP, "forward", "backward", *STEP], [*STEP, "interrupt"]), "ended with KeyboardInterrupt"),
        (([*STEP, *STEP], [*STEP, "leave"]), "rank 1 has ended"),
        (([*STEP, *STEP], [*STEP, "leave_at_once"]), "rank 1 is gone"),
        (([*STEP, *STEP], [*STEP, "stop", *STEP]), "within 5 s"),
    ],
    ids=["early end", "error", "interrupt", "sys.exit", "os._exit", "SIGSTOP"],
)
def test_a_rank_that_is_not_there_any_more_is_named(
    programs: list[list[str]], told: str, starter: Starter, tmp_path: Path
) -> None:
    first, _ = starter.run(run_operations, tmp_path, programs=programs)
    assert first.status == 0, first.log
    ((_, text),) = first.value["errors"]
    assert told in text


@pytest.mark.parametrize("moment", ["forward", "backward", "step", "save"])
def test_a_rank_that_is_killed_ends_the_others_with_an_error_that_names_it(
    moment: str, starter: Starter, tmp_path: Path
) -> None:
    others = ["train", "save" if moment == "save" else "train steps=2"]
    first, second = starter.run(run_uncaught, tmp_path, programs=[["train", f"kill_in_{moment}"], others])
    assert first.status == -signal.SIGKILL
    assert second.status == 1
    assert "RankError: rank 0 is gone" in second.log and "Start again from the last checkpoint" in second.log


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("programs", "statuses"),
    [
        ([["train"], ["train"]], [0, 0]),
        ([["train", "kill_in_backward"], ["train steps=2"]], [-signal.SIGKILL, 1]),
        ([["train", "raise_error"], ["train steps=2"]], [1, 1]),
        ([["train", "destroy"], ["train", "state"]], [0, 0]),
    ],
    ids=["well", "killed", "error", "group destroyed"],
)
def test_no_thread_of_ours_crashes_the_end_of_the_interpreter(
    programs: list[list[str]], statuses: list[int], starter: Starter, tmp_path: Path
) -> None:
    ranks = starter.run(run_uncaught, tmp_path, programs=programs, takes_down=True)
    assert [rank.status for rank in ranks] == statuses, [rank.log for rank in ranks]


@pytest.mark.parametrize("seed", range(DEFAULT_SEEDS))
def test_random_programs_end_as_one_process_does_or_with_an_error(seed: int, starter: Starter, tmp_path: Path) -> None:
    programs = programs_of(seed)
    check(starter.run(run_operations, tmp_path, programs=programs), expected(programs))


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(DEFAULT_SEEDS, HEAVY_SEEDS))
def test_many_random_programs_end_as_one_process_does_or_with_an_error(
    seed: int, starter: Starter, tmp_path: Path
) -> None:
    programs = programs_of(seed)
    check(starter.run(run_operations, tmp_path, programs=programs), expected(programs))
