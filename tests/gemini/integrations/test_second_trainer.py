"""A model that one Trainer has trained is trained on by others, each with its own optimizer, as without management."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from trainer_rig import PLACES, Maker, Tokens, arguments, differing, logged, model

from gemini.boosted import boosted

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # libraries' own warnings


@pytest.fixture(params=[p if p == "disk" else pytest.param(p, marks=pytest.mark.heavy) for p in PLACES])
def makers(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Maker, Maker]:
    return Maker(None, tmp_path), Maker(request.param, tmp_path)


@pytest.mark.parametrize(
    ("optim", "place"),
    [
        ("adamw_torch_fused", "disk"),
        *(pytest.param("adamw_torch_fused", place, marks=pytest.mark.heavy) for place in PLACES if place != "disk"),
        pytest.param("adagrad", "streamed", marks=pytest.mark.heavy),
    ],
)
def test_a_second_trainer_begins_with_new_states(optim: str, place: str, tmp_path: Path) -> None:
    results = []
    for maker in (Maker(None, tmp_path), Maker(place, tmp_path)):
        trained, logs = model(), []
        for decay in (0.0, 0.2):
            args = arguments(maker.folder, optim=optim, weight_decay=decay, max_grad_norm=decay)
            trainer = maker.trainer(trained, args)
            trainer.train()
            trainer.train()  # goes on with its own
            logs.append(logged(trainer))
        results.append((logs, trained))
    assert results[0][0] == results[1][0]
    assert not differing(results[1][1], results[0][1])
    assert boosted(results[1][1]).step_count == 16


def test_what_is_frozen_and_thawed_between_trainers_rests_and_trains(makers: tuple[Maker, Maker]) -> None:
    results = []
    for maker in makers:
        trained, logs = model(), []
        for is_trained in (True, False, True):
            trained.transformer.wte.requires_grad_(is_trained)
            trainer = maker.trainer(trained)
            trainer.train()
            logs.append(logged(trainer))
        results.append((logs, trained))
    assert results[0][0] == results[1][0]
    assert not differing(results[1][1], results[0][1])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", ["default", "streamed"])
def test_what_was_frozen_when_boosted_is_trained_by_a_later_trainer(place: str, tmp_path: Path) -> None:
    trained = [model(), model()]
    for maker, each in zip((Maker(None, tmp_path), Maker(place, tmp_path)), trained, strict=True):
        for is_trained in (False, True):
            each.transformer.h[0].requires_grad_(is_trained)
            maker.trainer(each).train()
    assert not differing(trained[1], trained[0])


def test_an_optimizer_that_is_given_to_two_trainers_keeps_its_states(makers: tuple[Maker, Maker]) -> None:
    results = []
    for maker in makers:
        trained = model()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, fused=True)
        for tokens in (Tokens(16), Tokens(12)):
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            trainer = maker.trainer(trained, train_dataset=tokens, optimizers=(optimizer, schedule))
            trainer.train()
            del trainer
        results.append((trained, optimizer.param_groups[0]["lr"]))
    assert not differing(results[1][0], results[0][0])
    assert results[0][1] == results[1][1]


def test_an_optimizer_of_a_part_of_the_parameters_trains_and_clips_this_part(makers: tuple[Maker, Maker]) -> None:
    results = []
    for maker in makers:
        trained, logs = model(), []
        maker.trainer(trained).train()
        part = torch.optim.AdamW([p for n, p in trained.named_parameters() if "mlp" in n], lr=1e-2, fused=True)
        for optimizers in ((part, None), (None, None)):
            trainer = maker.trainer(trained, arguments(maker.folder, max_grad_norm=0.5), optimizers=optimizers)
            trainer.train()
            logs.append(logged(trainer))
        results.append((logs, trained))
    assert results[0][0] == results[1][0]
    assert not differing(results[1][1], results[0][1])


def test_what_cannot_be_gone_on_with_is_refused_and_the_first_optimizer_goes_on(tmp_path: Path) -> None:
    maker, trained = Maker("default", tmp_path), model()
    first = maker.trainer(trained)
    first.train()
    other: Any = maker.trainer(trained, arguments(tmp_path, optim="sgd"))
    with pytest.raises(ValueError, match=r"keeps exp_avg .* build the model anew"):
        other.train()
    first.train()
    assert boosted(trained).step_count == 8
    maker.trainer(trained).train()
    with pytest.raises(ValueError, match="another optimizer has taken its place"):
        first.train()
