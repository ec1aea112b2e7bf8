"""GPT-2, small and plain. Names and layouts are those of transformers, which loads what we save."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(kw_only=True)
class GPTConfig:
    """Sizes of a GPT. Feed-forward layers are four times as wide as ``hidden``; there is no dropout."""

    layers: int
    hidden: int
    heads: int
    """Attention heads; each sees ``hidden / heads`` of the numbers."""
    seq_len: int
    """Longest sequence: the number of position embeddings."""
    vocab_size: int = 256
    architectures: list[str] = field(default_factory=lambda: ["GPT2LMHeadModel"])
    """Name of the class in transformers that loads it. This and ``dtype`` are set by what writes a checkpoint."""
    dtype: torch.dtype | None = None
    """Of the saved weights."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "seq_len", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}")

    def parameter_count(self) -> int:
        """Elements of all parameters, the tied embedding once."""
        block = 12 * self.hidden**2 + 13 * self.hidden
        return (self.vocab_size + self.seq_len + 2) * self.hidden + self.layers * block

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` for transformers' ``GPT2LMHeadModel.from_pretrained``."""
        content = {
            "model_type": "gpt2",
            "architectures": self.architectures,
            "dtype": str(self.dtype or torch.float32).removeprefix("torch."),
            "activation_function": "gelu_new",
            "n_layer": self.layers,
            "n_embd": self.hidden,
            "n_head": self.heads,
            "n_positions": self.seq_len,
            "vocab_size": self.vocab_size,
            "layer_norm_epsilon": 1e-5,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": True,
            # Bytes have no special tokens; GPT-2's own default, 50256, would lie outside of the vocabulary.
            "bos_token_id": None,
            "eos_token_id": None,
        }
        (Path(folder) / "config.json").write_text(json.dumps(content, indent=2) + "\n")


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], as OpenAI stored GPT-2's."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = Conv1D(config.hidden, 3 * config.hidden)
        self.c_proj = Conv1D(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(hidden, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.c_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return projected


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.hidden, 4 * config.hidden)
        self.c_proj = Conv1D(4 * config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return projected


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden)
        self.wpe = nn.Embedding(config.seq_len, config.hidden)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        out: Tensor = self.ln_f(x)
        return out


class GPT2LMHeadModel(nn.Module):
    """The language model. Named as transformers names it, because checkpoints tell the name of the class.

    Parameters
    ----------
    config
        Its sizes; stays readable as ``model.config``, also by what writes checkpoints.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._initialise()

    def _initialise(self) -> None:
        """As GPT-2: narrow normals, narrower still where a residual branch ends; biases are zeros already."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits ``[batch, length, vocabulary]``; with ``targets`` ``[batch, length]``, their mean cross-entropy."""
        logits: Tensor = self.lm_head(self.transformer(tokens))
        if targets is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
