"""Whole models: lazy equals eager bit for bit, in every parameter, buffer, tie and in the generator afterwards."""

from __future__ import annotations

import warnings

import pytest
import torch
from model_zoo import DECODERS, FAMILIES, build
from torch import nn

transformers = pytest.importorskip("transformers")

ENTRIES = [
    pytest.param(name, make, id=f"{family}-{name}")
    for family, models in FAMILIES.items()
    for name, make in models.items()
]


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("name", "make"), ENTRIES)
def test_transformers_models_equal_eager_bit_for_bit(name, make, check_lazy_equals_eager):
    check_lazy_equals_eager(lambda: build(name, make))


TIMM = ["vit_tiny_patch16_224", "deit3_small_patch16_224", "convit_tiny", "tnt_s_legacy_patch16_224", "resnet18",
        "efficientnet_b0", "convnext_atto", "dm_nfnet_f0", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224",
        "levit_128s", "mobilevit_xxs"]  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_equal_eager_bit_for_bit(name, check_lazy_equals_eager):
    timm = pytest.importorskip("timm", reason="timm or the torchvision that it needs is missing", exc_type=ImportError)
    check_lazy_equals_eager(lambda: timm.create_model(name))


def test_the_sweep_covers_every_family():
    assert min(len(models) for models in FAMILIES.values()) >= 5
    assert sum(len(models) for models in FAMILIES.values()) >= 120


def test_a_materialised_model_computes_what_the_eager_one_computes():
    from gemini.lazy import LazyInitContext

    make = DECODERS["GPT2LMHeadModel"]
    torch.manual_seed(3)
    eager = build("GPT2LMHeadModel", make).eval()
    torch.manual_seed(3)
    with LazyInitContext():
        lazy = build("GPT2LMHeadModel", make).eval()
    LazyInitContext.materialize(lazy)
    ids = torch.randint(0, eager.config.vocab_size, (2, 8))
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
