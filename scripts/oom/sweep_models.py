"""The models of the sweep: each a function without arguments that gives a module and its batches.

``gemini-stat estimate sweep_models:NAME`` takes them as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = Callable[[int, int], dict[str, Any]]
Made = tuple[nn.Module, Batch]


class Language(nn.Module):
    """A model of tokens, whose loss its forward computes, over any body."""

    def __init__(self, vocabulary: int, width: int, body: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(vocabulary, width), body
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(self.embedding(tokens))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        scores = self.head(hidden[:, :-1])
        return functional.cross_entropy(scores.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Pictures(nn.Module):
    """A stack of convolutions with batch norm."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(
            *[
                nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
                for _ in range(layers)
            ]
        )
        self.last = nn.Linear(channels, 100)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.last(self.body(self.first(pictures)).mean((2, 3))).square().mean()  # type: ignore[no-any-return]


def _layers(width: int, count: int, heads: int = 8) -> nn.Module:
    return nn.Sequential(
        *[
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(count)
        ]
    )


def _tokens(vocabulary: int, batch_size: int, seq_len: int) -> Batch:
    return lambda *_: {"tokens": torch.randint(0, vocabulary, (batch_size, seq_len))}


def _language(
    width: int, count: int, batch_size: int, seq_len: int, vocabulary: int = 2000, tied: bool = False
) -> Made:
    return Language(vocabulary, width, _layers(width, count), tied), _tokens(vocabulary, batch_size, seq_len)


def small() -> Made:
    return _language(256, 6, 2, 64)


def deep() -> Made:
    return _language(256, 36, 1, 64)


def wide() -> Made:
    return _language(768, 4, 1, 64)


def tied() -> Made:
    return _language(256, 4, 1, 64, vocabulary=50_000, tied=True)


def untied() -> Made:
    return _language(256, 4, 1, 64, vocabulary=30_000)


def long() -> Made:
    return _language(256, 8, 1, 512)


def many() -> Made:
    return _language(256, 8, 16, 64)


def heavy() -> Made:
    return _language(512, 12, 4, 128)


def recurrent() -> Made:
    return Language(2000, 512, nn.LSTM(512, 512, 3, batch_first=True)), _tokens(2000, 4, 32)


def perceptron() -> Made:
    body = nn.Sequential(*[part for _ in range(8) for part in (nn.Linear(1024, 1024), nn.GELU(), nn.Dropout(0.1))])
    return Language(1000, 1024, body), _tokens(1000, 4, 64)


def pictures() -> Made:
    return Pictures(128, 12), lambda *_: {"pictures": torch.randn(4, 3, 32, 32)}


def large_pictures() -> Made:
    return Pictures(96, 8), lambda *_: {"pictures": torch.randn(4, 3, 64, 64)}


NAMES = (
    *("small", "deep", "wide", "tied", "untied", "long", "many", "heavy"),
    *("recurrent", "perceptron", "pictures", "large_pictures"),
)
