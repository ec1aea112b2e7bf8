"""``bf16=True`` and ``fp16=True`` of a Trainer: what computes in which dtype, and what contradicts a plugin."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from trainer_rig import PLACES, Maker, ManagedTrainer, Tokens, arguments, differing, logged, model  # noqa: E402

from gemini.boosted import boosted  # noqa: E402
from gemini.booster.plugin import GeminiPlugin  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # libraries' own warnings

LENGTH = {"max_steps": 3}


class Masters(torch.optim.Optimizer):
    """AdamW on fp32 masters of parameters in bf16, in plain PyTorch."""

    def __init__(self, parameters: list[Tensor], masters: list[Tensor], **options: Any) -> None:
        super().__init__(parameters, options)
        self.masters = masters
        self.inner = torch.optim.AdamW(masters, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        for parameter, master in zip(parameters, self.masters, strict=True):
            master.grad = parameter.grad.float()
        self.inner.step()
        for parameter, master in zip(parameters, self.masters, strict=True):
            parameter.copy_(master)


def losses(trainer: Any) -> list[float]:
    return [value for entry in logged(trainer) for name, value in entry.items() if "loss" in name]


@pytest.mark.parametrize("place", PLACES)
def test_bf16_is_bf16_with_fp32_masters(place: str, tmp_path: Path) -> None:
    copy = model()
    masters = [p.detach().clone() for p in copy.parameters()]
    copy.bfloat16()
    plain = transformers.Trainer(
        model=copy,
        args=arguments(tmp_path, **LENGTH),
        train_dataset=Tokens(),
        eval_dataset=Tokens(8),
        optimizers=(Masters(list(copy.parameters()), masters, lr=1e-2, weight_decay=0.0), None),
    )
    args = arguments(tmp_path, bf16=True, bf16_full_eval=True, **LENGTH)
    ours = Maker(place, tmp_path, precision="bf16").trainer(model(), args, eval_dataset=Tokens(8))
    for trainer in (plain, ours):
        trainer.evaluate()
        trainer.train()
        trainer.evaluate()
    assert losses(ours) == losses(plain)
    assert args.bf16_full_eval
    named = dict(zip((name for name, _ in copy.named_parameters()), masters, strict=True))
    found = ours.model.state_dict()
    assert not [name for name, master in named.items() if not torch.equal(found[name], master)]


@pytest.mark.parametrize("place", PLACES)
def test_over_fp32_parameters_bf16_is_the_trainers_own_autocast(place: str, tmp_path: Path) -> None:
    results = []
    for maker in (Maker(None, tmp_path), Maker(place, tmp_path)):
        args = arguments(tmp_path, bf16=True, max_grad_norm=0.5, **LENGTH)
        trainer = maker.trainer(model(), args, eval_dataset=Tokens(8))
        trainer.evaluate()
        trainer.train()
        results.append((logged(trainer), trainer.model))
    assert results[1][0] == results[0][0]
    assert not differing(results[1][1], results[0][1])


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_plugin_that_is_not_given_follows_the_trainer(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="gemini.integrations.precision"):
        trainer = ManagedTrainer(
            model=model(), args=arguments(tmp_path, max_steps=1, **{name: True}), train_dataset=Tokens()
        )
    assert [record.message for record in caplog.records if record.message.startswith(f"{name}=True")]
    trainer.train()
    assert boosted(trainer.model).config.precision == name
    assert trainer.accelerator.mixed_precision == "no"


def test_fp16_has_a_loss_scale_and_a_schedule_waits_for_steps_that_overflow(tmp_path: Path) -> None:
    asked = {"fp16": True, "max_grad_norm": 0.5, "lr_scheduler_type": "linear", "max_steps": 4}
    rates, scales = [], []
    for first in (2.0**16, 2.0**40):
        maker = Maker("streamed", tmp_path, precision="fp16", initial_scale=first, max_scale=2.0**40, hysteresis=1)
        trainer = maker.trainer(model(), arguments(tmp_path, **asked))
        trainer.train()
        rates.append([entry["learning_rate"] for entry in logged(trainer) if "learning_rate" in entry])
        scales.append(boosted(trainer.model).step.scaling)
    assert scales[0].skipped_steps == 0
    assert rates[0] == sorted(rates[0], reverse=True) and len(set(rates[0])) == 4
    assert scales[1].skipped_steps > 0 and scales[1].scaler.scale < 2.0**40
    assert rates[1] == [rates[0][0]] * 4  # nothing was learnt


@pytest.mark.parametrize("steps", [1, 2])
def test_fp16_trains_the_same_wherever_chunks_are(steps: int, tmp_path: Path) -> None:
    asked = {"fp16": True, "fp16_full_eval": True, "max_grad_norm": 0.5, "gradient_accumulation_steps": steps}
    results = []
    for place in ("default", "disk"):
        trainer = Maker(place, tmp_path, precision="fp16").trainer(model(), arguments(tmp_path, **asked, **LENGTH))
        trainer.train()
        trainer.evaluate(Tokens(8))
        results.append((logged(trainer), trainer.model))
    assert results[1][0] == results[0][0]
    assert 0.5 < results[0][0][0]["grad_norm"] < 10
    assert not differing(results[1][1], results[0][1])


@pytest.mark.parametrize(
    ("precision", "asked"),
    [("fp16", "bf16"), ("bf16", "fp16"), ("fp32", "fp16"), ("fp32", "bf16_full_eval"), ("bf16", "fp16_full_eval")],
)
def test_what_contradicts_the_plugin_is_refused_with_both_names(precision: str, asked: str, tmp_path: Path) -> None:
    plugin = GeminiPlugin(precision=precision, telemetry=False)
    with pytest.raises(ValueError, match=f'{asked}=True.*precision="{precision}".*leave {asked} off'):
        ManagedTrainer(
            model=model(), args=arguments(tmp_path, **{asked: True}), train_dataset=Tokens(), gemini_plugin=plugin
        )


def test_plain_and_managed_trainers_share_their_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path, bf16=True, **LENGTH)
    ours = [Maker("default", tmp_path, precision="bf16").trainer(model(), args) for _ in range(2)]
    for trainer in ours:
        trainer.train()
    assert logged(ours[0]) == logged(ours[1])
    assert args.mixed_precision == "bf16"
