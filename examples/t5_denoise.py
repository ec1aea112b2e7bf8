"""Train a T5, encoder and decoder, to write down text of which it sees three of four bytes.

python examples/t5_denoise.py
python examples/t5_denoise.py --activation-policy recompute
"""

import argparse
from collections.abc import Sequence

import torch
from reference_text import ByteWindows
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration

import gemini

MASK = ByteWindows.vocab_size
CONFIG = T5Config(
    vocab_size=MASK + 1, d_model=128, d_ff=256, d_kv=32, num_layers=2, num_heads=4, dropout_rate=0.0,
    decoder_start_token_id=0, use_cache=False,
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    policies = ("keep", "offload", "recompute", "auto")
    parser.add_argument("--activation-policy", choices=policies, help="what becomes of what forward saves")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    plugin = gemini.GeminiPlugin(precision="fp32", activation_policy=options.activation_policy)
    booster = gemini.Booster(plugin=plugin)
    with gemini.LazyInitContext():
        model = T5ForConditionalGeneration(CONFIG)
    optimizer = gemini.HybridAdam(model.parameters(), lr=3e-3)
    model, optimizer, *_ = booster.boost(model, optimizer)
    for step, batch in enumerate(DataLoader(ByteWindows(160, 64), batch_size=8), start=1):
        whole = batch["input_ids"]
        holes = torch.rand(whole.shape) < 0.25
        loss = model(input_ids=whole.masked_fill(holes, MASK), labels=whole).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
