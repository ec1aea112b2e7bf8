"""The models of the matrix and their batches: small ones of transformers with random values, and no hub."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_VOCABULARY = 512
_SHORT, _LONG = 64, 256
"""Tokens of a micro-batch: few where activations are kept, many where they leave or are computed again."""


@dataclass(frozen=True, slots=True)
class Size:
    """Another size than the usual one, of the GPT."""

    layers: int = 8
    rows: int | None = None
    """Sequences of 128 tokens in a micro-batch."""


USUAL = Size()


def build(name: str, *, tiny: bool, size: Size = USUAL) -> nn.Module:
    """A model; a tiny one of the same kind has the same code run."""
    if name == "gpt":
        return _gpt(int(tiny), size.layers)
    return _BUILD[name](int(tiny))


def batch(name: str, number: int, *, is_long: bool, dtype: torch.dtype, size: Size = USUAL) -> dict[str, Any]:
    """The micro-batch of this number."""
    generator = torch.Generator().manual_seed(number)
    count = _LONG if is_long else _SHORT
    if name == "vit":
        pixels = torch.randn(count // 16, 3, 32, 32, generator=generator)
        return {
            "pixel_values": pixels.to(dtype),
            "labels": torch.randint(0, 10, (count // 16,), generator=generator),
        }
    shape = (2, count // 2) if size.rows is None else (size.rows, 128)
    tokens = torch.randint(0, _VOCABULARY, shape, generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def adapted(model: nn.Module) -> nn.Module:
    """A frozen model with adapters, as peft makes it."""
    from peft import get_peft_model

    return get_peft_model(model, adapters())  # type: ignore[arg-type,no-any-return]


def adapters() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)


def _gpt(tiny: int, layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=_VOCABULARY,
            n_positions=512,
            n_embd=64 if tiny else 320,
            n_layer=1 if tiny else layers,
            n_head=2 if tiny else 5,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def _llama(tiny: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=64 if tiny else 320,
            intermediate_size=128 if tiny else 864,
            num_hidden_layers=1 if tiny else 8,
            num_attention_heads=2 if tiny else 5,
            num_key_value_heads=1 if tiny else 5,
            max_position_embeddings=512,
            use_cache=False,
        )
    )


def _t5(tiny: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=_VOCABULARY,
            d_model=64 if tiny else 320,
            d_kv=32 if tiny else 64,
            d_ff=128 if tiny else 1280,
            num_layers=1 if tiny else 4,
            num_decoder_layers=1 if tiny else 4,
            num_heads=2 if tiny else 5,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


def _moe(tiny: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=_VOCABULARY,
            hidden_size=64 if tiny else 256,
            intermediate_size=64 if tiny else 384,
            num_hidden_layers=1 if tiny else 7,
            num_attention_heads=2 if tiny else 4,
            num_key_value_heads=1 if tiny else 4,
            num_local_experts=4,
            num_experts_per_tok=2,
            experts_implementation="eager",
            max_position_embeddings=512,
            use_cache=False,
        )
    )


def _vit(tiny: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64 if tiny else 320,
            num_hidden_layers=1 if tiny else 8,
            num_attention_heads=2 if tiny else 5,
            intermediate_size=128 if tiny else 1280,
            image_size=32,
            patch_size=8,
            num_labels=10,
        )
    )


_BUILD: dict[str, Callable[[int], nn.Module]] = {
    "llama": _llama,
    "t5": _t5,
    "moe": _moe,
    "vit": _vit,
    "lora": lambda tiny: _gpt(tiny, layers=12),
}
