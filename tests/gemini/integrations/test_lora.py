"""LoRA adapters of peft on a boosted model: only they train, and frozen weights cost no states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loop import SMALL
from parity import check_at_rest
from torch import Tensor

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import GRADIENT
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own, about each other
peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def adapted(booster: Booster, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=64, n_head=2, vocab_size=96, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    if not options:
        options = {
            "lora_config": peft.LoraConfig(r=4, fan_in_fan_out=True, target_modules=["c_attn"], lora_dropout=0.1)
        }
    return booster.enable_lora(model, **options)


def train(booster: Booster, model: Any, optimizer: Any, managed: bool) -> list[float]:
    losses = []
    torch.manual_seed(1)
    for step in range(4):
        tokens = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens).loss
        booster.backward(loss, optimizer) if managed else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(managed: bool) -> tuple[Any, list[float], dict[str, Tensor]]:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, device_memory="256KiB", **SMALL))
    model = adapted(booster)
    optimizer: Any = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if managed:
        model, optimizer, *_ = booster.boost(model, optimizer)
    losses = train(booster, model, optimizer, managed)
    return model, losses, {name: value.clone() for name, value in model.state_dict().items()}


def test_adapters_train_as_without_management_and_frozen_weights_have_no_states() -> None:
    model, losses, weights = run(managed=True)
    _, plain_losses, plain_weights = run(managed=False)
    assert losses == plain_losses
    assert not [name for name, value in weights.items() if not torch.equal(value, plain_weights[name])]
    check_at_rest(model)
    manager = boosted(model).manager
    for name, parameter in model.named_parameters():
        place = manager.find(parameter)
        assert place is not None
        assert (GRADIENT in place[0].homes or place[0].is_trainable) == ("lora_" in name)


def test_saved_adapters_load_into_another_boosted_model(tmp_path: Path) -> None:
    model, _, weights = run(managed=True)
    model.save_pretrained(tmp_path)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, device_memory="256KiB", **SMALL))
    again = adapted(booster, pretrained_dir=str(tmp_path))
    optimizer: Any = HybridAdam([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    again, *_ = booster.boost(again, optimizer)
    loaded = again.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
