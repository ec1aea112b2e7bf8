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
from gemini.errors import CheckpointError
from gemini.nn.optimizer import HybridAdam
from gemini.quantization import Quantization

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


def train(booster: Booster, model: Any, optimizer: Any, managed: bool, steps: int = 4) -> list[float]:
    losses = []
    torch.manual_seed(1)
    for step in range(steps):
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


def linear(**options: Any) -> Any:
    return peft.LoraConfig(r=2, fan_in_fan_out=True, target_modules=["c_attn"], **options)


CONFIGURATIONS = {
    "dora": lambda: linear(use_dora=True),
    "modules, biases": lambda: linear(use_rslora=True, modules_to_save=["lm_head"], bias="lora_only"),
    "tokens": lambda: linear(trainable_token_indices=[1, 2]),
    "embeddings": lambda: peft.LoraConfig(r=2, target_modules=["wte", "c_proj"]),
    "another method": lambda: peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
    "prompt": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_all_kinds_of_adapters_are_saved_as_peft_saves_them(tmp_path: Path, kind: str) -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, device_memory="256KiB", **SMALL))
    model: Any = adapted(booster, lora_config=CONFIGURATIONS[kind]())
    if kind == "modules, biases":
        model.add_adapter("second", linear())
    optimizer: Any = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, *_ = booster.boost(model, optimizer)
    train(booster, model, optimizer, managed=True, steps=1)
    for use_safetensors in (False, True):
        ours, pefts = (tmp_path / f"{name}-{use_safetensors}" for name in ("ours", "pefts"))
        booster.save_lora_as_pretrained(model, str(ours), use_safetensors)
        model.save_pretrained(pefts, safe_serialization=use_safetensors)
        files = {file.relative_to(pefts) for file in pefts.rglob("*") if file.is_file()}
        assert {file.relative_to(ours) for file in ours.rglob("*") if file.is_file()} == files
        for file in files:
            if file.suffix == ".json":
                assert (ours / file).read_text() == (pefts / file).read_text()
            elif "adapter_model" in file.name:
                saved, expected = _load(ours / file), _load(pefts / file)
                assert expected and saved.keys() == expected.keys()
                assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_grown_embeddings_are_saved_with_the_adapters(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=96, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(104, mean_resizing=False)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **SMALL))
    model, *_ = booster.boost(booster.enable_lora(base, linear()))
    booster.save_lora_as_pretrained(model, str(tmp_path / "ours"), use_safetensors=True)
    model.save_pretrained(tmp_path / "pefts")
    ours, pefts = (_load(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "pefts"))
    assert any(value.shape == (104, 64) for value in pefts.values())
    assert ours.keys() == pefts.keys() and all(torch.equal(ours[name], value) for name, value in pefts.items())


def test_adapters_saved_in_the_other_form_before_are_not_read_again(tmp_path: Path) -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **SMALL))
    model = adapted(booster)
    booster.save_lora_as_pretrained(model, str(tmp_path), use_safetensors=True)
    with torch.no_grad():
        wanted = next(p for name, p in model.named_parameters() if "lora_A" in name).add_(1)
    booster.save_lora_as_pretrained(model, str(tmp_path), use_safetensors=False)
    again = adapted(booster, pretrained_dir=str(tmp_path))
    assert torch.equal(next(p for name, p in again.named_parameters() if "lora_A" in name), wanted)


def test_damaged_adapters_are_not_loaded(tmp_path: Path) -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **SMALL))
    booster.save_lora_as_pretrained(adapted(booster), str(tmp_path), use_safetensors=True)
    file = tmp_path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors.*lora_"):
        adapted(booster, pretrained_dir=str(tmp_path))


class Nf4:
    """What a ``BitsAndBytesConfig`` says; making one needs the package."""

    load_in_4bit, bnb_4bit_quant_type = True, "nf4"


def test_arguments_are_recognised_in_our_order_and_in_colossalais(tmp_path: Path) -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **SMALL))

    def base() -> Any:
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=32, n_positions=8)
        )

    made = booster.enable_lora(base(), linear())
    booster.save_lora_as_pretrained(made, str(tmp_path))
    ways: list[tuple[Any, ...]] = [
        (linear(),),
        (None, linear()),
        (str(tmp_path),),
        (tmp_path, linear()),
        (linear(), tmp_path),
    ]
    for given in ways:
        assert booster.enable_lora(base(), *given).active_peft_config.r == 2
    for more in (("nf4",), (None, "nf4"), (None, None, True), (None, Nf4())):
        model = booster.enable_lora(base(), linear(), *more)
        assert Quantization.for_model(model, None) == Quantization("nf4")
    with pytest.raises(ValueError, match=r"give a lora_config \(peft\.LoraConfig\) or a pretrained_dir"):
        booster.enable_lora(base())
    with pytest.raises(TypeError, match="two of config"):
        booster.enable_lora(base(), linear(), linear(bias="all"))
    with pytest.raises(TypeError, match="lora_config=4 of type int"):
        booster.enable_lora(base(), None, 4)
    model, *_ = booster.boost(made)
    with pytest.raises(ValueError, match=r"enable_lora comes before booster\.boost"):
        booster.enable_lora(model, linear())


def test_a_save_that_fails_leaves_the_adapters_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **SMALL))
    model = adapted(booster)
    booster.save_lora_as_pretrained(model, str(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_" in name).add_(1)
    with pytest.raises(CheckpointError, match="disk full"):
        booster.save_lora_as_pretrained(model, str(tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    booster = Booster(plugin=GeminiPlugin(telemetry=False))
    with pytest.raises(TypeError, match=r"a Linear without adapters: save it with booster\.save_model"):
        booster.save_lora_as_pretrained(torch.nn.Linear(2, 2), str(tmp_path))
