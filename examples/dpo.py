"""Direct preference optimisation as a plain loop: the reference is the model with its adapters switched off.

python examples/dpo.py
python examples/dpo.py --beta 0.5
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig
from reference_text import ByteWindows
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import gemini

CONFIG = LlamaConfig(
    vocab_size=ByteWindows.vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, use_cache=False,
)  # fmt: skip
PROMPT = 16  # tokens of each sequence that both answers share


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the reference holds the model")
    return parser.parse_args(arguments)


def pairs(count: int, batch_size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Texts as they go on, and the same beginnings with the rest backwards."""
    text = ByteWindows(count * batch_size, length)
    for first in range(0, len(text), batch_size):
        chosen = torch.stack([text[place]["input_ids"] for place in range(first, first + batch_size)])
        yield chosen, torch.cat([chosen[:, :PROMPT], chosen[:, PROMPT:].flip(1)], dim=1)


def log_probability(model: Any, tokens: Tensor) -> Tensor:
    """Of each answer, given its prompt."""
    of_tokens = model(tokens).logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return of_tokens[:, PROMPT - 1 :].sum(1)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    booster = gemini.Booster(plugin=gemini.GeminiPlugin(precision="fp32"))
    with gemini.LazyInitContext():
        model = LlamaForCausalLM(CONFIG)
    model = booster.enable_lora(model, lora_config=LoraConfig(r=8, target_modules="all-linear"))
    optimizer = gemini.HybridAdam([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    model, optimizer, *_ = booster.boost(model, optimizer)

    for step, answers in enumerate(pairs(10, 4, 64), start=1):
        both = torch.cat(answers)
        with torch.no_grad(), model.disable_adapter():  # no second model: the base is the reference
            reference_chosen, reference_rejected = log_probability(model, both).chunk(2)
        chosen, rejected = log_probability(model, both).chunk(2)
        margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        loss = -functional.logsigmoid(options.beta * margin).mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.4f}, margin {margin.mean().item():.3f}")


if __name__ == "__main__":
    main()
