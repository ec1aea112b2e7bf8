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


@pytest.mark.parametrize("use_safetensors", [False, True])
def test_adapters_alone_are_saved_as_peft_saves_them(tmp_path: Path, use_safetensors: bool) -> None:
    model, _, weights = run(managed=True)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, device_memory="256KiB", **SMALL))
    booster.save_lora_as_pretrained(model, str(tmp_path / "ours"), use_safetensors)
    weight_file = "adapter_model.safetensors" if use_safetensors else "adapter_model.bin"
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {"README.md", "adapter_config.json", weight_file}
    again = adapted(booster, pretrained_dir=str(tmp_path / "ours"))
    loaded = again.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items() if "lora_" in name)

    model.save_pretrained(tmp_path / "pefts", safe_serialization=use_safetensors)
    ours, pefts = (_load(tmp_path / name / weight_file) for name in ("ours", "pefts"))
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[name], pefts[name]) for name in pefts)


def _load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".bin":
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
    from safetensors.torch import load_file

    return load_file(file)


def test_modules_trained_beside_adapters_and_a_second_adapter_are_saved(tmp_path: Path) -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **SMALL))
    config = peft.LoraConfig(r=2, fan_in_fan_out=True, target_modules=["c_attn"], modules_to_save=["lm_head"])
    model: Any = adapted(booster, lora_config=config)
    model.add_adapter("second", peft.LoraConfig(r=2, fan_in_fan_out=True, target_modules=["c_attn"]))
    optimizer: Any = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, *_ = booster.boost(model, optimizer)
    train(booster, model, optimizer, managed=True)
    booster.save_lora_as_pretrained(model, str(tmp_path / "ours"))
    model.save_pretrained(tmp_path / "pefts", safe_serialization=False)
    for name in ("adapter_model.bin", "second/adapter_model.bin"):
        ours, pefts = _load(tmp_path / "ours" / name), _load(tmp_path / "pefts" / name)
        assert ours.keys() == pefts.keys()
        assert all(torch.equal(ours[each], pefts[each]) for each in pefts)
    assert any("lm_head" in name for name in _load(tmp_path / "ours" / "adapter_model.bin"))
    assert (tmp_path / "ours" / "second" / "adapter_config.json").exists()


def test_a_save_that_fails_leaves_the_adapters_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **SMALL))
    model = adapted(booster)
    booster.save_lora_as_pretrained(model, str(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_" in name).add_(1)
    with pytest.raises(OSError, match="disk full"):
        booster.save_lora_as_pretrained(model, str(tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    booster = Booster(plugin=GeminiPlugin(telemetry=False))
    with pytest.raises(TypeError, match=r"a Linear without adapters: save it with booster\.save_model"):
        booster.save_lora_as_pretrained(torch.nn.Linear(2, 2), str(tmp_path))
