"""What a managed Trainer does, step for step, is what a plain one does: clipping, evaluating, resuming, going on."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from trainer_rig import PLACES, Maker, Tokens, TokensOneByOne, arguments, differing, logged, model  # noqa: E402

from gemini.boosted import boosted, is_boosted  # noqa: E402
from gemini.booster import Booster  # noqa: E402
from gemini.chunk import Tier  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # libraries' own warnings


@pytest.fixture(params=PLACES)
def makers(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Maker, Maker]:
    """Of plain and of managed trainers."""
    return Maker(None, tmp_path), Maker(request.param, tmp_path)


@pytest.mark.one_in(3)
def test_two_trainings_with_the_same_clipping_arguments_are_both_clipped(makers: tuple[Maker, Maker]) -> None:
    results = []
    for maker in makers:
        args, trained = arguments(maker.folder, max_grad_norm=0.05, gradient_accumulation_steps=2), [model(), model()]
        before = copy.deepcopy(args.to_dict())
        trainers = [maker.trainer(each, args) for each in trained]
        for trainer in trainers:
            trainer.train()
        assert args.to_dict() == before
        results.append((trained, [logged(trainer) for trainer in trainers]))
    (plain, plain_logs), (ours, our_logs) = results
    assert our_logs == plain_logs
    assert our_logs[0][0]["grad_norm"] > 0.05
    assert our_logs[0] == our_logs[1]
    assert not differing(ours[1], plain[1])


def test_gradients_that_callbacks_see_are_those_of_a_plain_trainer(tmp_path: Path) -> None:
    class Seen(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.norms: list[list[float]] = []

        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            self.norms.append([p.grad.norm().item() for p in model.parameters()])

    seen = [Seen(), Seen()]
    for maker, callback in zip((Maker(None, tmp_path), Maker("streamed", tmp_path)), seen, strict=True):
        maker.trainer(model(), arguments(tmp_path, max_grad_norm=0.05), callbacks=[callback]).train()
    assert seen[0].norms == seen[1].norms


def test_a_norm_of_the_plugin_comes_before_the_trainers(tmp_path: Path) -> None:
    plain, ours = model(), model()
    Maker(None, tmp_path).trainer(plain, arguments(tmp_path, max_grad_norm=0.05)).train()
    trainer = Maker("default", tmp_path, max_norm=0.05).trainer(ours, arguments(tmp_path, max_grad_norm=1e-6))
    trainer.train()
    assert not differing(ours, plain)
    assert logged(trainer)[0]["grad_norm"] > 0.05


def test_updates_in_backward_train_the_same_and_log_no_norm(tmp_path: Path) -> None:
    plain, ours = model(), model()
    Maker(None, tmp_path).trainer(plain).train()
    trainer = Maker("disk", tmp_path, update_in_backward=True).trainer(ours)
    trainer.train()
    assert not differing(ours, plain)
    assert not [entry for entry in logged(trainer) if "grad_norm" in entry]


def test_gradients_of_the_disk_place_are_on_disk(tmp_path: Path) -> None:
    trained = model()
    Maker("disk", tmp_path).trainer(trained).train()
    gradients = [chunk.gradient for chunk in boosted(trained).manager.chunks if chunk.gradient is not None]
    assert any(gradient.buffer is not None and gradient.buffer.tier is Tier.DISK for gradient in gradients)


@pytest.mark.one_in(3)
def test_evaluation_and_prediction_are_the_same_before_between_and_after(makers: tuple[Maker, Maker]) -> None:
    results = []
    for maker in makers:
        trainer = maker.trainer(model(), eval_dataset=Tokens(10))
        losses = [trainer.evaluate()["eval_loss"], trainer.predict(TokensOneByOne(10)).metrics["test_loss"]]
        trainer.train()
        losses += [trainer.evaluate(data)["eval_loss"] for data in (Tokens(10), TokensOneByOne(10))]
        trainer.train()
        losses += [trainer.evaluate()["eval_loss"]]
        results.append((losses, logged(trainer), trainer.model))
    assert results[0][:2] == results[1][:2]
    assert not differing(results[1][2], results[0][2])


class Ten(torch.utils.data.IterableDataset[Any]):
    """Ten items whose losses are their numbers."""

    def __iter__(self) -> Any:
        return ({"x": torch.ones(1), "labels": torch.tensor(float(i))} for i in range(10))


class Number(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (labels * self.weight.mean() * x.squeeze(-1)).mean(), "logits": x}


def test_the_loss_of_an_iterable_dataset_is_the_mean_over_its_items(tmp_path: Path) -> None:
    trainer = Maker("default", tmp_path).trainer(Number(), train_dataset=None)
    assert trainer.evaluate(Ten())["eval_loss"] == pytest.approx(4.5)


def test_a_boosted_model_is_evaluated_in_its_chunks(tmp_path: Path) -> None:
    plain, ours = model(), model()
    maker = Maker("streamed", tmp_path)
    ours, *_ = Booster(plugin=maker.plugin()).boost(ours)
    expected = Maker(None, tmp_path).trainer(plain).predict(Tokens(10))
    found = maker.trainer(ours).predict(Tokens(10))
    assert torch.equal(torch.tensor(found.predictions), torch.tensor(expected.predictions))


def test_training_resumes_from_either_kind_of_checkpoint_and_ends_with_the_best(tmp_path: Path) -> None:
    asked = {
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.1,
        "load_best_model_at_end": True, "max_grad_norm": 0.5, "lr_scheduler_type": "linear",
    }  # fmt: skip
    plain, managed = Maker(None, tmp_path / "plain"), Maker("disk", tmp_path / "ours")
    (tmp_path / "ours").mkdir()
    results = []
    for maker in (plain, managed):
        trainer = maker.trainer(model(), arguments(maker.folder, **asked), eval_dataset=Tokens(10))
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint).name
        results.append((logged(trainer), best, trainer.evaluate()["eval_loss"], trainer.model))
    assert results[0][:3] == results[1][:3]
    assert not differing(results[1][3], results[0][3])
    for source in (plain, managed):
        args = arguments(source.folder, **asked)
        again = managed.trainer(model(), args, eval_dataset=Tokens(10))
        again.train(resume_from_checkpoint=str(source.folder / "checkpoint-2"))
        assert logged(again) == results[0][0]
        assert not differing(again.model, results[0][3])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", ["default", "streamed"])
def test_neftune_and_gradient_checkpointing_and_a_model_made_anew_train_the_same(place: str, tmp_path: Path) -> None:
    results = []
    for maker in (Maker(None, tmp_path), Maker(place, tmp_path)):
        args = arguments(tmp_path, neftune_noise_alpha=5.0, gradient_checkpointing=True, label_smoothing_factor=0.1)
        trainer = maker.trainer(None, args, model_init=lambda: model())
        logs = []
        for _ in range(2):
            trainer.train()
            logs.append(logged(trainer))
        assert logs[0] == logs[1]
        results.append((logs, trainer.model))
    assert results[0][0] == results[1][0]
    assert not differing(results[1][1], results[0][1])
    assert is_boosted(results[1][1])
