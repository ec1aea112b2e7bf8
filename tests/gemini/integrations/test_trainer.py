"""The adapters for transformers' Trainer, against the installed transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gemini.boosted import boosted
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from trainer_rig import ManagedTrainer, Tokens, arguments, model  # noqa: E402

from gemini.integrations.hugging_face import GeminiTrainerCallback  # noqa: E402


class Seen(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adagrad", "adafactor"])
def test_a_managed_trainer_trains_as_a_plain_one_with_its_own_optimizer(optim: str, tmp_path: Path) -> None:
    asked = {"optim": optim, "weight_decay": 0.1}
    plain_model = model()
    plain = transformers.Trainer(model=plain_model, args=arguments(tmp_path / "a", **asked), train_dataset=Tokens())
    managed = ManagedTrainer(
        model=model(),
        args=arguments(tmp_path / "b", **asked),
        train_dataset=Tokens(),
        gemini_plugin=GeminiPlugin(precision="fp32", telemetry=False),
    )
    assert losses(managed) == losses(plain)
    assert boosted(managed.model).step_count == 4
    for name, value in managed.model.state_dict().items():
        assert torch.equal(value, plain_model.state_dict()[name]), name
    managed.save_model(str(tmp_path / "saved"))
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, managed.model.state_dict()["lm_head.weight"])


def test_a_given_optimizer_is_kept(tmp_path: Path) -> None:
    trained = model()
    optimizer = HybridAdam(trained.parameters(), lr=0.25, states="bf16")
    trainer = ManagedTrainer(
        model=trained,
        args=arguments(tmp_path),
        train_dataset=Tokens(),
        optimizers=(optimizer, None),
        gemini_plugin=GeminiPlugin(telemetry=False),
    )
    trainer.train()
    assert boosted(trained).step_count == 4
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer  # accelerate wraps it


def test_logs_hold_the_statistics_before_others_see_them(tmp_path: Path) -> None:
    seen = Seen()
    trainer = ManagedTrainer(
        model=model(),
        args=arguments(tmp_path),
        train_dataset=Tokens(),
        callbacks=[seen],
        gemini_plugin=GeminiPlugin(telemetry=False),
    )
    GeminiTrainerCallback.first_of(trainer, keys=("host/used_bytes", "step/count"))
    trainer.train()
    entries = [log for log in seen.logs if "loss" in log]
    assert [log["memory/step/count"] for log in entries] == [1, 2, 3, 4]
    assert all(log["memory/host/used_bytes"] > 0 for log in entries)
    assert "memory/host/peak_bytes" not in entries[0]
    assert trainer.state.log_history[0]["memory/step/count"] == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"max_grad_norm": 0.1}, r"max_grad_norm=0\.0"), ({"gradient_accumulation_steps": 2}, "accumulation_steps at 1")],
)
def test_what_needs_all_gradients_is_refused_beside_updates_in_backward(
    asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plugin = GeminiPlugin(update_in_backward=True, telemetry=False)
    trainer = ManagedTrainer(
        model=model(), args=arguments(tmp_path, **asked), train_dataset=Tokens(), gemini_plugin=plugin
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave torch_compile off"):
        ManagedTrainer(model=model(), args=arguments(tmp_path, torch_compile=True), train_dataset=Tokens())


def test_the_callback_leaves_a_plain_model_alone(tmp_path: Path) -> None:
    trainer = transformers.Trainer(model=model(), args=arguments(tmp_path), train_dataset=Tokens())
    GeminiTrainerCallback.first_of(trainer)
    trainer.train()
    assert not [key for entry in trainer.state.log_history for key in entry if key.startswith("memory/")]
