"""Train a plain `nn.Module`, first without us and then with a part of it on disk: the losses are the same numbers.

python examples/plain_module.py
python examples/plain_module.py --host-memory 16MiB
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gemini

STEPS = 8


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host-memory", default="8MiB", help="bound on the model data in RAM; the rest is on disk")
    return parser.parse_args(arguments)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 16))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def train(model: Any, optimizer: Any, inputs: Tensor, targets: Tensor) -> list[float]:
    """The loop of plain PyTorch. It serves both."""
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(1)
    inputs, targets = torch.randn(64, 64), torch.randint(16, (64,))
    plain = train(*build(), inputs, targets)

    with tempfile.TemporaryDirectory() as folder:
        plugin = gemini.GeminiPlugin(precision="fp32", host_memory=options.host_memory, offload_dir=folder)
        model, optimizer, *_ = gemini.Booster(plugin=plugin).boost(*build())
        managed = train(model, optimizer, inputs, targets)
        on_disk = model.memory_stats()["disk/used_bytes"] / 2**20

    for step, (before, after) in enumerate(zip(plain, managed, strict=True), start=1):
        print(f"step {step} loss {after:.4f}, plain {before:.4f}")
    print(f"{on_disk:.1f} MiB of the model data on disk, equal to the last bit: {plain == managed}")


if __name__ == "__main__":
    main()
