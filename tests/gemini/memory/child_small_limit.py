"""Run by test_small_limits.py: a GPT trained under RLIMIT_DATA (MiB, the first argument) with offload_dir alone."""

import json
import resource
import sys

import torch
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam

VOCABULARY = 1000


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        down: Tensor = self.down(nn.functional.gelu(self.up(self.between(x))))
        return x + down


def gpt(width: int, layers: int) -> nn.Module:
    blocks = [Block(width) for _ in range(layers)]
    return nn.Sequential(
        nn.Embedding(VOCABULARY, width), *blocks, nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
    )


def main() -> None:
    limit_bytes, width, layers, folder = int(sys.argv[1]) << 20, int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.manual_seed(0)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    with LazyInitContext():
        model = gpt(width, layers)
    optimizer = HybridAdam(model.parameters(), lr=1e-3)
    booster = Booster(plugin=GeminiPlugin(offload_dir=folder, telemetry=False))
    boosted_model, optimizer, *_ = booster.boost(model, optimizer)
    losses = []
    for _ in range(3):
        tokens = torch.randint(0, VOCABULARY, (4, 64))
        loss = nn.functional.cross_entropy(boosted_model(tokens).flatten(0, 1).float(), tokens.flatten())
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    budgets = boosted(boosted_model).capacities.budgets.values()
    print(json.dumps({"losses": losses, "sources": [budget.source for budget in budgets]}))


if __name__ == "__main__":
    main()
