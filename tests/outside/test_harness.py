"""The harness notices what it is there to notice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from outside.catalogue import USES, cases
from outside.harness import Use, judge
from outside.models import MODELS
from outside.placements import PLACEMENTS, Placement, Refusal
from outside.running import Training

pytestmark = pytest.mark.usefixtures("one_thread")

NEVER = Refusal(RuntimeError, "booster.save_model")


def verdict_of(run: Any, folder: Path, placement: str = "tight", **options: Any) -> str:
    return judge(Use("reading", "a use", run, **options), PLACEMENTS[placement], str(folder)).kind


@pytest.mark.one_in(4)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model", MODELS)
def test_training_alone_is_equal_and_chunks_do_move(placement: str, model: str, tmp_path: Path) -> None:
    for library in Use("reading", "a use", lambda run: None, model).libraries:
        pytest.importorskip(library, reason=f"{library} is not installed")
    assert verdict_of(lambda run: None, tmp_path, placement, model=model) == "equal"


def test_other_numbers_are_wrong(tmp_path: Path) -> None:
    def use(run: Training) -> Any:
        return 1.0 if run.booster is None else 1.0000000000000002

    assert verdict_of(use, tmp_path) == "WRONG"


def test_nan_is_wrong_even_where_plain_pytorch_has_it_too(tmp_path: Path) -> None:
    assert verdict_of(lambda run: torch.full((2,), float("nan")), tmp_path) == "WRONG"


def test_a_missing_item_and_another_type_are_wrong(tmp_path: Path) -> None:
    assert verdict_of(lambda run: [1] * (1 + (run.booster is None)), tmp_path) == "WRONG"
    assert verdict_of(lambda run: 1 if run.booster is None else 1.0, tmp_path) == "WRONG"


def test_a_lost_write_is_wrong(tmp_path: Path) -> None:
    def use(run: Training) -> Any:
        if run.booster is None:
            run.model[3].weight.data.mul_(0.5)

    assert verdict_of(use, tmp_path) == "WRONG"


def test_states_that_differ_without_changing_a_weight_are_wrong(tmp_path: Path) -> None:
    def use(run: Training) -> Any:
        if run.booster is None:
            run.model[3].weight.requires_grad_(False)
            run.optimizer.state[run.model[3].weight]["exp_avg"].add_(1)

    assert verdict_of(use, tmp_path, ends_training=True) == "WRONG"


def test_an_error_that_names_no_way_out_is_an_error(tmp_path: Path) -> None:
    def use(run: Training) -> Any:
        if run.booster is not None:
            raise RuntimeError("a boosted model cannot do it")

    assert verdict_of(use, tmp_path, refusal=NEVER) == "ERROR"
    assert verdict_of(use, tmp_path) == "ERROR"


def test_what_ought_to_be_refused_and_is_not_is_wrong(tmp_path: Path) -> None:
    assert verdict_of(lambda run: None, tmp_path, refusal=NEVER) == "WRONG"
    assert verdict_of(lambda run: None, tmp_path, refusal=NEVER, may_be_equal=True) == "equal"


@pytest.mark.parametrize("changes", [False, True])
def test_a_refusal_must_come_before_anything_changes(changes: bool, tmp_path: Path) -> None:
    def use(run: Training) -> Any:
        run.backward()
        if changes:
            run.optimizer.param_groups[0]["lr"] = 1.0
        raise RuntimeError("a boosted model cannot do it; use booster.save_model")

    assert verdict_of(use, tmp_path, refusal=NEVER) == ("WRONG" if changes else "refused")


def test_a_placement_in_which_nothing_moves_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing was evicted"):
        judge(Use("reading", "a use", lambda run: None), Placement("tight", device_share=20.0), str(tmp_path))
    with pytest.raises(AssertionError, match="nothing is on disk"):
        judge(Use("reading", "a use", lambda run: None), Placement("disk", host_weights=9.0), str(tmp_path))


def test_there_are_enough_uses_and_each_runs_in_three_placements() -> None:
    assert len(USES) >= 110
    assert all(sum(name == use for use, _ in cases(PLACEMENTS)) >= 3 for name in USES)
