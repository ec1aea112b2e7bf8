"""The models of the catalogue: tiny, and each parameter's length a multiple of 16.

In such lengths ``torch.optim.AdamW(fused=True)`` does exactly the arithmetic of the managed optimizer; in the last
elements of others its scalar loop rounds differently.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

WIDTH = 64
DEPTH = 12
"""Such that RAM with room to work in, for weights and for gradients has none for the moments."""
WORDS = 64


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


def vectors(generator: Generator) -> Tensor:
    return torch.randn(4, WIDTH, generator=generator)


def tokens(generator: Generator) -> Tensor:
    return torch.randint(0, WORDS, (2, 8), generator=generator)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch)
    logits = getattr(logits, "logits", logits)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@dataclass(frozen=True)
class Model:
    """A model and its data."""

    build: Callable[[], nn.Module]
    batch: Callable[[Generator], Tensor] = vectors
    loss: Callable[[nn.Module, Tensor], Tensor] = mean_square
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(functional.gelu(self.wide(self.norm(x))))  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """An embedding, residual blocks, and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(5)])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def layers() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])


def normalised() -> nn.Module:
    """With buffers: running means."""
    return nn.Sequential(*[m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))])


def encoder() -> nn.Module:
    """Of a kind that evaluates faster, by another kernel, where its parameters are plain ones."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4)


def sequences(generator: Generator) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=generator)


def gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        n_layer=6, n_embd=32, n_head=2, n_inner=64, vocab_size=WORDS, n_positions=16, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def lora() -> nn.Module:
    """Every layer has an adapter; only adapters train."""
    import peft

    config = peft.LoraConfig(r=48, target_modules=[str(i) for i in range(DEPTH)], init_lora_weights=False)
    return peft.get_peft_model(layers(), config)


MODELS: dict[str, Model] = {
    "layers": Model(layers),
    "normalised": Model(normalised),
    "blocks": Model(Blocks, tokens, next_token),
    "tied": Model(lambda: Blocks(tied=True), tokens, next_token),
    "encoder": Model(encoder, sequences),
    "gpt2": Model(gpt2, tokens, next_token),
    "lora": Model(lora),
}
