"""transformers' Trainer on several ranks: as one process that accumulates their batches."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

import torch  # noqa: E402
from trainer_rig import ManagedTrainer, Tokens, arguments, logged, model  # noqa: E402

from gemini.booster.plugin import GeminiPlugin  # noqa: E402

SIZES: dict[str, Any] = {"precision": "fp32", "host_memory": "64MiB", "telemetry": False}


def trained(folder: Path, accumulated: int, plugin: dict[str, Any] | None) -> tuple[list[Any], dict[str, Tensor]]:
    """What a managed trainer has logged and come to; a plain one without options of a plugin."""
    of = model()
    args = arguments(folder, gradient_accumulation_steps=accumulated, per_device_train_batch_size=2, max_grad_norm=1.0)
    options = {"model": of, "args": args, "train_dataset": Tokens()}
    if plugin is None:
        trainer = transformers.Trainer(**options)
    else:
        trainer = ManagedTrainer(**options, gemini_plugin=GeminiPlugin(**SIZES, **plugin))
    trainer.train()
    return logged(trainer), {name: value.clone() for name, value in of.state_dict().items()}


def test_two_ranks_train_as_a_plain_trainer_that_accumulates_two_batches(worlds, tmp_path: Path) -> None:
    [(plain_log, plain)] = worlds(1).run(trained, tmp_path, 2, None)
    for log, weights in worlds(2).run(trained, tmp_path, 1, {"gradient_reduction": "mean"}):
        assert log == plain_log
        assert [name for name, value in plain.items() if not torch.equal(value, weights[name])] == []


def test_the_sum_of_gradients_is_refused_because_a_trainer_counts_on_their_mean(worlds, tmp_path: Path) -> None:
    for outcome in worlds(2).outcomes(trained, tmp_path, 1, {}):
        assert outcome.error.startswith("ValueError: a Trainer on several ranks counts on the mean of their gradients")
        assert 'GeminiPlugin(gradient_reduction="mean")' in outcome.error
