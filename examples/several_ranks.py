"""Train on several ranks, or on one that accumulates their batches: the losses are the same numbers.

torchrun --nproc-per-node 2 examples/several_ranks.py
python examples/several_ranks.py --accumulate 2
"""

import argparse
from collections.abc import Sequence

import torch
from reference_text import ByteWindows
from torch import distributed
from transformers import GPT2Config, GPT2LMHeadModel

import gemini

CONFIG = GPT2Config(
    vocab_size=ByteWindows.vocab_size, n_positions=64, n_embd=128, n_layer=2, n_head=4, use_cache=False,
    bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
BATCH, STEPS = 4, 10


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accumulate", type=int, default=1, help="batches of each rank in a step")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    gemini.launch_from_torch()
    torch.manual_seed(0)  # the same weights on all ranks
    plugin = gemini.GeminiPlugin(precision="fp32")
    booster = gemini.Booster(plugin=plugin)
    with gemini.LazyInitContext():
        model = GPT2LMHeadModel(CONFIG)
    optimizer = gemini.HybridAdam(model.parameters(), lr=3e-3)
    model, optimizer, *_ = booster.boost(model, optimizer)

    batches = plugin.dp_size * options.accumulate  # in each step, over all ranks
    text = ByteWindows(BATCH * batches * STEPS, 64)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    for step in range(STEPS):
        total = torch.zeros(())
        for place in range(rank * options.accumulate, (rank + 1) * options.accumulate):
            first = (step * batches + place) * BATCH
            tokens = torch.stack([text[row]["input_ids"] for row in range(first, first + BATCH)])
            loss = model(tokens, labels=tokens).loss
            booster.backward(loss / batches, optimizer)  # gradients are summed over ranks
            total += loss.detach() / batches
        optimizer.step()
        optimizer.zero_grad()
        if distributed.is_initialized():
            distributed.all_reduce(total)
        if rank == 0:
            print(f"step {step + 1} loss {total.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
