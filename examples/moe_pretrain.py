"""Pretrain a Mixtral, a mixture of experts, whose experts are partly on disk.

python examples/moe_pretrain.py
python examples/moe_pretrain.py --host-memory 8MiB
"""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from reference_text import ByteWindows
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM

import gemini

CONFIG = MixtralConfig(
    vocab_size=ByteWindows.vocab_size, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    output_router_logits=True, use_cache=False,
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host-memory", default="6MiB", help="bound on the model data in RAM; the rest is on disk")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plugin = gemini.GeminiPlugin(precision="fp32", host_memory=options.host_memory, offload_dir=folder)
        booster = gemini.Booster(plugin=plugin)
        with gemini.LazyInitContext():
            model = MixtralForCausalLM(CONFIG)
        optimizer = gemini.HybridAdam(model.parameters(), lr=3e-3)
        model, optimizer, *_ = booster.boost(model, optimizer)
        for step, batch in enumerate(DataLoader(ByteWindows(60, 64), batch_size=4), start=1):
            outputs = model(**batch)  # its loss has the balance of the experts in it
            booster.backward(outputs.loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step} loss {outputs.loss.item():.4f}, balance {outputs.aux_loss.item():.4f}")
        stats = model.memory_stats()
        print(", ".join(f"{tier} {stats[f'{tier}/used_bytes'] / 2**20:.1f} MiB" for tier in ("host", "disk")))


if __name__ == "__main__":
    main()
