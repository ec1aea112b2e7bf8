"""A language model that imports nothing but torch and takes more memory than time: what children train under a cap."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query_key_value, self.output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        attended = functional.scaled_dot_product_attention(*parts.transpose(-3, -2), is_causal=True)
        x = x + self.output(attended.transpose(-3, -2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, vocab: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.head = nn.Linear(hidden, vocab)
        self.recomputes = False

    def gradient_checkpointing_enable(self) -> None:
        self.recomputes = True

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def gpt(
    layers: int = 4, hidden: int = 64, heads: int = 4, vocab: int = 256
) -> tuple[nn.Module, Callable[[int, int], dict[str, Any]]]:
    """A model, and a function from batch size and sequence length to keyword arguments, as ``estimate`` asks for."""

    def batch(size: int, length: int) -> dict[str, Any]:
        return {"tokens": torch.arange(size * length).remainder(vocab).reshape(size, length)}

    return GPT(layers, hidden, heads, vocab), batch


def wide(layers: int) -> tuple[nn.Module, Callable[[int, int], dict[str, Any]]]:
    """One with more parameters beside its activations."""
    return gpt(layers, hidden=256)
