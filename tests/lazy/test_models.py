"""Whole models: lazy equals eager bit for bit, in every parameter, buffer, tie and in the generator afterwards."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

CONFIG_SEEDS = [0, 1]


def sizes(seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 4])
    hidden = heads * rng.choice([4, 6, 8])
    return {"heads": heads, "hidden": hidden, "layers": rng.randint(1, 3), "vocab": rng.randint(17, 99),
            "inner": rng.randint(5, 40)}  # fmt: skip


def gpt2(s):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=s["hidden"], n_layer=s["layers"], n_head=s["heads"], vocab_size=s["vocab"], n_positions=16))  # fmt: skip


def common(s):
    return {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
            "intermediate_size": s["inner"]}  # fmt: skip


def llama(s):
    config = transformers.LlamaConfig(**common(s), num_key_value_heads=s["heads"], vocab_size=s["vocab"])
    return transformers.LlamaForCausalLM(config)


def bert(s):
    return transformers.BertForMaskedLM(transformers.BertConfig(**common(s), vocab_size=s["vocab"]))


def t5(s):
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=s["hidden"], d_ff=s["inner"], d_kv=4, num_layers=s["layers"], num_heads=s["heads"],
        vocab_size=s["vocab"]))  # fmt: skip


def mixtral(s):
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **common(s), num_key_value_heads=s["heads"], vocab_size=s["vocab"], num_local_experts=3))  # fmt: skip


def vit(s):
    return transformers.ViTModel(transformers.ViTConfig(**common(s), image_size=16, patch_size=8))


def whisper(s):
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        d_model=s["hidden"], encoder_layers=s["layers"], decoder_layers=s["layers"],
        encoder_attention_heads=s["heads"], decoder_attention_heads=s["heads"], encoder_ffn_dim=s["inner"],
        decoder_ffn_dim=s["inner"], vocab_size=s["vocab"],
        max_source_positions=16, max_target_positions=16, pad_token_id=0, decoder_start_token_id=1))  # fmt: skip


def mamba(s):
    return transformers.MambaForCausalLM(transformers.MambaConfig(
        hidden_size=s["hidden"], num_hidden_layers=s["layers"], vocab_size=s["vocab"], state_size=4))  # fmt: skip


@pytest.mark.parametrize("seed", CONFIG_SEEDS)
@pytest.mark.parametrize("make", [gpt2, llama, bert, t5, mixtral, vit, whisper, mamba], ids=lambda f: f.__name__)
def test_transformers_models_equal_eager_bit_for_bit(make, seed, check_lazy_equals_eager):
    check_lazy_equals_eager(lambda: make(sizes(seed)))


def test_a_materialised_model_computes_what_the_eager_one_computes():
    from gemini.lazy import LazyInitContext

    torch.manual_seed(3)
    eager = gpt2(sizes(0)).eval()
    torch.manual_seed(3)
    with LazyInitContext():
        lazy = gpt2(sizes(0)).eval()
    LazyInitContext.materialize(lazy)
    ids = torch.randint(0, sizes(0)["vocab"], (2, 8))
    a, b = eager(ids, labels=ids), lazy(ids, labels=ids)
    a.loss.backward()
    b.loss.backward()
    assert torch.equal(a.logits, b.logits)
    for p, q in zip(eager.parameters(), lazy.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.GroupNorm(2, 4),
            nn.PReLU(4),
        )  # fmt: skip
        self.stack.to(memory_format=torch.channels_last)


def flattening():
    """Runs a forward in __init__ to learn a size, as small vision models do."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten())
    net.append(nn.Linear(net(torch.randn(1, 1, 8, 8)).shape[1], 3))
    return net


MODULES = {
    "linear": lambda: nn.Linear(5, 7),
    "linear in bfloat16": lambda: nn.Linear(5, 7, dtype=torch.bfloat16),
    "float64 bilinear": lambda: nn.Bilinear(3, 4, 5, dtype=torch.float64),
    "transformer": lambda: nn.Transformer(16, 2, 2, 2, 32),
    "lstm": lambda: nn.LSTM(5, 7, 2, bidirectional=True),
    "gru with projection of lstm": lambda: nn.ModuleList([nn.GRU(3, 4), nn.LSTM(3, 4, proj_size=2)]),
    "multihead attention": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=4, vdim=6),
    "conv and batch norm": ConvNet,
    "embedding with padding": lambda: nn.Embedding(11, 4, padding_idx=3),
    "embedding bag with max norm": lambda: nn.EmbeddingBag(11, 4, max_norm=1.0),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 7)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(5, 7)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(2, 4, 3)),
    "forward in init": flattening,
    "half": lambda: nn.Transformer(16, 2, 1, 1, 32).half(),
    "adaptive softmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10]),
    "skip_init": lambda: nn.Sequential(nn.Linear(2, 2), zeroed(nn.utils.skip_init(nn.Linear, 3, 4))),
}


def zeroed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize("name", MODULES)
def test_torch_modules_equal_eager_bit_for_bit(name, check_lazy_equals_eager):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own advice about nested tensors and old parametrizations
        check_lazy_equals_eager(MODULES[name])
