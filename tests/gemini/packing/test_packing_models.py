"""The published sizes of well-known models, on the meta device: little waste, and a ring that fits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gemini.chunk import GRADIENT, MemoryMap, Tier
from gemini.config import GeminiConfig
from gemini.memory.capacity import Capacities
from gemini.memory.tracker import Budget
from gemini.packing.packing import Packing, decide, managed_parameters

transformers = pytest.importorskip("transformers")
GIB = 1 << 30


def gpt2(**sizes: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))  # type: ignore[no-any-return]


def llama(**sizes: int) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))  # type: ignore[no-any-return]


def bert(**sizes: int) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))  # type: ignore[no-any-return]


def t5(**sizes: int) -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))  # type: ignore[no-any-return]


def mixtral(**sizes: int) -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))  # type: ignore[no-any-return]


BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LLAMA_3_8B = {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, int], float]] = {
    "GPT-2": (gpt2, {}, 0.124),
    "GPT-2 XL": (gpt2, {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1.558),
    "Llama 2 7B": (llama, {}, 6.738),
    "Llama 3 8B": (llama, LLAMA_3_8B, 8.030),
    "BERT base": (bert, {}, 0.110),
    "BERT large": (bert, BERT_LARGE, 0.335),
    "T5 small": (t5, {}, 0.061),
    "T5 base": (t5, {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, 0.223),
    "T5 3B": (t5, {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32}, 2.852),
    "Mixtral 8x7B": (mixtral, {}, 46.703),
}
"""How to build it, its published sizes where they are not the class's defaults, and billions of parameters."""


def on_meta(name: str) -> nn.Module:
    build, sizes, billions = MODELS[name]
    with torch.device("meta"):
        model = build(**sizes)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    return model


def groups_of(model: nn.Module, kind: str) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    if kind == "one group":
        return [{"params": parameters}]
    return [{"params": [p for p in parameters if p.dim() > 1]}, {"params": [p for p in parameters if p.dim() <= 1]}]


def capacities_of(device: int) -> Capacities:
    nbytes = {Tier.DEVICE: device, Tier.HOST: 1 << 40, Tier.DISK: 0}
    return Capacities(
        torch.device("cpu"), MemoryMap.ACCELERATOR, {tier: Budget(n, "test") for tier, n in nbytes.items()}, None
    )


def padding(packing: Packing) -> float:
    total = sum(plan.layout.numel for plan in packing.plans)
    return 1.0 - sum(plan.layout.used_numel for plan in packing.plans) / total


@pytest.mark.one_in(2)
@pytest.mark.parametrize("groups", ["one group", "decay and no decay"])
@pytest.mark.parametrize("share", [1, 8], ids=["a large device", "a small device"])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_a_known_model_waste_less_than_five_percent(name: str, share: int, groups: str) -> None:
    model = on_meta(name)
    numel = sum(p.numel() for p in managed_parameters(model).values())
    largest = max(p.numel() for p in model.parameters())
    device = max(16 * numel // share**2, 8 * largest)
    packing = decide(model, groups_of(model, groups), GeminiConfig(), capacities_of(device))
    assert packing.search.waste_ratio < 0.05, "share of chunk-sized blocks that stays unused"
    assert padding(packing) < 0.001, "chunks are cut to what they hold: what is really allocated in vain"
    on_device = sum(
        plan.layout.numel * plan.specs[name].dtype.itemsize
        for plan in packing.plans
        for name, tier in plan.tiers.items()
        if tier is Tier.DEVICE
    )
    streamed = [plan.layout.numel * 2 for plan in packing.plans]
    assert on_device + 2 * max(streamed) <= device or on_device + sum(streamed) <= device


def test_frozen_parameters_of_a_known_model_have_chunks_of_their_own_without_states() -> None:
    model = on_meta("GPT-2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ln_" in name)
    packing = decide(model, groups_of(model, "one group"), GeminiConfig(), capacities_of(GIB))
    assert packing.search.waste_ratio < 0.05
    for plan in packing.plans:
        trainable = {"ln_" in slot.name for slot in plan.layout.slots}
        assert len(trainable) == 1
        assert ("exp_avg" in plan.tiers) == (GRADIENT in plan.tiers) == trainable.pop()


def test_a_small_model_takes_no_more_than_it_needs() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    packing = decide(model, groups_of(model, "one group"), GeminiConfig(), capacities_of(GIB))
    assert [plan.layout.numel for plan in packing.plans] == [2 * (128 + 32)]
