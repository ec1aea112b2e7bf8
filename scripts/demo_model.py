"""What the demo's comparison trains: a pretrained encoder that fills in masked words, and the text it learns from.

The encoder is all-MiniLM-L6-v2 (22.7 M parameters, 6 layers). Half of them are its table of words, which is also its
last layer. Both sides train the same model, which has that table in slices, so that no parameter is much larger than
the others.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional

SLICES = 16
LENGTH, BATCH = 64, 8
HELD_OUT = 10
"""Of as many pages one is for the loss that is shown."""
MASKED = 0.15

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Pages:
    """Tokens of the Python reference, those to learn from and those held out."""

    def __init__(self, folder: Path) -> None:
        from pydoc_data.topics import topics

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._mask = tokenizer.token_to_id("[MASK]")
        parts: dict[bool, list[int]] = {True: [], False: []}
        for number, name in enumerate(sorted(topics)):
            parts[number % HELD_OUT == 0] += tokenizer.encode(topics[name], add_special_tokens=False).ids
        self._tokens = {is_held_out: torch.tensor(ids) for is_held_out, ids in parts.items()}

    def batch(self, number: int, is_held_out: bool) -> Batch:
        """Tokens with some masked, where those are, and what was there; always as many, so that shapes do not vary."""
        generator, source = torch.Generator().manual_seed(number), self._tokens[is_held_out]
        starts = torch.randint(len(source) - LENGTH, (BATCH, 1), generator=generator)
        tokens = source[starts + torch.arange(LENGTH)].flatten()
        places = torch.randperm(len(tokens), generator=generator)[: int(MASKED * len(tokens))]
        masked = tokens.index_fill(0, places, self._mask)
        return masked.view(BATCH, LENGTH), places, tokens[places]


class Slice(torch.nn.Module):
    """Some rows of the table of words."""

    def __init__(self, first: int, rows: int, width: int) -> None:
        super().__init__()
        self.first, self.rows = first, rows
        self.weight = torch.nn.Parameter(torch.empty(rows, width))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Of tokens their rows, or zeros where those are another slice's; of hidden states the products with all."""
        if given.is_floating_point():
            return functional.linear(given, self.weight)
        row = given - self.first
        is_here = (row >= 0) & (row < self.rows)
        return functional.embedding(row.where(is_here, 0), self.weight) * is_here.unsqueeze(-1)


class Words(torch.nn.Module):
    """The table of words: the first layer, and the last one."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        firsts = [words * number // SLICES for number in range(SLICES + 1)]
        self.slices = torch.nn.ModuleList(Slice(first, end - first, width) for first, end in itertools.pairwise(firsts))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return sum(each(tokens) for each in self.slices)  # type: ignore[return-value]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([each(hidden) for each in self.slices], dim=-1)


class Encoder(torch.nn.Module):
    """The model with a head that names the masked words; gives the loss of a batch."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.bert.embeddings.word_embeddings = Words(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = torch.nn.LayerNorm(config.hidden_size)

    def forward(self, tokens: torch.Tensor, places: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(tokens).last_hidden_state.flatten(0, 1)[places]
        hidden = self.norm(functional.gelu(self.head(hidden)))
        return functional.cross_entropy(self.bert.embeddings.word_embeddings.logits(hidden), words)

    def last_layers(self, count: int) -> None:
        """Let nothing but the head and as many of the last layers train."""
        self.requires_grad_(False)
        layers = self.bert.encoder.layer
        for part in [self.head, self.norm, *layers[len(layers) - count :]]:
            part.requires_grad_(True)


def configuration(folder: Path) -> Any:
    config = transformers.BertConfig.from_pretrained(folder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


def write_weights(folder: Path, target: Path) -> None:
    """The package's weights by the names of `Encoder`; the head, which they do not have, begins as the identity."""
    config = configuration(folder)
    table = "embeddings.word_embeddings.weight"
    weights = {
        f"bert.{name}": value
        for name, value in load_file(folder / "model.safetensors").items()
        if name != table and not name.startswith("pooler.") and "position_ids" not in name
    }
    words = load_file(folder / "model.safetensors")[table]
    first = 0
    for number, each in enumerate(Words(*words.shape).slices):
        weights[f"bert.embeddings.word_embeddings.slices.{number}.weight"] = words[first : first + each.rows].clone()
        first += each.rows
    weights |= {"head.weight": torch.eye(config.hidden_size), "head.bias": torch.zeros(config.hidden_size)}
    weights |= {"norm.weight": torch.ones(config.hidden_size), "norm.bias": torch.zeros(config.hidden_size)}
    save_file({name: value.contiguous() for name, value in weights.items()}, target, {"format": "pt"})
