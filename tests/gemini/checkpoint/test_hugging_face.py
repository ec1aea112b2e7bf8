"""transformers reads what we write, and we read what transformers writes."""

import json

import pytest
import torch
import transformers
from checkpoint_cases import assert_same, boost, gpt2, llama, logits, mixtral, train, values

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.checkpoint import load_model, save_model
from gemini.lazy import LazyInitContext

SHARDS = {"shard": True, "size_per_shard": "10KiB"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", [{}, SHARDS, {"use_safetensors": False}], ids=str)
@pytest.mark.parametrize("build", [gpt2, llama])
def test_from_pretrained_gives_the_same_logits(tmp_path, build, options) -> None:
    booster, model, optimizer = boost(build())
    train(booster, model, optimizer, range(1))
    booster.save_model(model, tmp_path, **options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(build())
    assert_same(loaded.state_dict(), values(model))
    assert torch.equal(logits(loaded), logits(model))


def test_the_configuration_names_the_users_class_and_the_saved_dtype(tmp_path) -> None:
    _, model, _ = boost(gpt2(), "bf16")
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float32"
    assert (tmp_path / "generation_config.json").exists()
    assert model.config.architectures is None  # the model's own is left alone
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded.state_dict(), values(model))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("build", [gpt2, llama, mixtral])
def test_a_lazily_boosted_model_loads_what_save_pretrained_writes(tmp_path, build, options) -> None:
    theirs = build(seed=0)
    theirs.save_pretrained(tmp_path, **options)
    with LazyInitContext():
        model = build(seed=1)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, *_ = booster.boost(model)
    booster.load_model(model, tmp_path)
    assert_same(model.state_dict(), values(theirs))
    assert torch.equal(logits(model), logits(theirs))


def test_experts_stored_one_by_one_are_put_together(tmp_path) -> None:
    theirs = mixtral(seed=0)
    theirs.save_pretrained(tmp_path / "theirs")
    save_model(theirs, tmp_path / "ours")
    for checkpoint in ("theirs", "ours"):
        model = mixtral(seed=1)
        load_model(model, tmp_path / checkpoint)
        assert_same(model.state_dict(), values(theirs))
    assert_same(type(theirs).from_pretrained(tmp_path / "ours").state_dict(), values(theirs))


def test_a_checkpoint_of_the_base_model_goes_into_the_model_with_a_head(tmp_path) -> None:
    base = gpt2(seed=0, cls="GPT2Model")
    base.save_pretrained(tmp_path)
    _, model, _ = boost(gpt2(seed=1))
    load_model(model, tmp_path)
    found = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    del found["lm_head.weight"]
    assert_same(found, values(base))


def test_a_checkpoint_with_a_tied_head_goes_into_the_base_model(tmp_path) -> None:
    full = gpt2(seed=0)
    full.save_pretrained(tmp_path)
    model = gpt2(seed=1, cls="GPT2Model")
    load_model(model, tmp_path)
    assert_same(model.state_dict(), values(full.transformer))


def test_buffers_that_older_versions_stored_are_left_out(tmp_path) -> None:
    state = dict(gpt2(seed=0).state_dict())
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = gpt2(seed=1)
    load_model(model, tmp_path)
    assert_same(model.state_dict(), values(gpt2(seed=0)))


def test_gamma_and_beta_of_old_bert_checkpoints_are_understood(tmp_path) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    first, second = transformers.BertModel(config), transformers.BertModel(config)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in first.state_dict().items()
    }
    assert any(name.endswith("gamma") for name in state)
    torch.save(state, tmp_path / "bert.pt")
    load_model(second, tmp_path / "bert.pt")
    assert_same(second.state_dict(), values(first))


def test_transformers_own_save_pretrained_writes_the_masters_of_a_boosted_model(tmp_path) -> None:
    _, model, _ = boost(gpt2(), "bf16")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(loaded.state_dict(), values(model))
