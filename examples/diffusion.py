"""Train a small diffusion transformer (DiT) of plain torch to draw rings: it learns the noise that was added.

python examples/diffusion.py
python examples/diffusion.py --host-memory 4MiB
"""

import argparse
import math
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import gemini

SIZE, PATCH, WIDTH = 16, 4, 96


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host-memory", help='bound on the model data in RAM, such as "4MiB"; the rest is on disk')
    return parser.parse_args(arguments)


class Block(nn.Module):
    """Attention and an MLP, shifted and scaled by what the time says."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.of_time = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, mlp_gate = self.of_time(time)[:, None].chunk(4, -1)
        y = functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        x = x + gate * self.attention(y, y, y, need_weights=False)[0]
        return x + mlp_gate * self.mlp(functional.layer_norm(x, (WIDTH,)))


class DiT(nn.Module):
    """Pictures in patches, with the time as sines, to the noise in them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(torch.randn(1, (SIZE // PATCH) ** 2, WIDTH) * 0.02)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.out = nn.Linear(WIDTH, PATCH * PATCH)

    def forward(self, pictures: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(torch.linspace(0, math.log(1000), WIDTH // 2))
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.patches(pictures).flatten(2).mT + self.places
        for block in self.blocks:
            x = block(x, time)
        return functional.pixel_shuffle(self.out(x).mT.unflatten(2, (SIZE // PATCH, SIZE // PATCH)), PATCH)


def rings(count: int) -> Tensor:
    """Pictures of a ring each, at a random place and of a random size."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    middle, radius = torch.rand(count, 2, 1, 1) * 6 + 5, torch.rand(count, 1, 1) * 3 + 2
    distance = ((rows - middle[:, 0]) ** 2 + (columns - middle[:, 1]) ** 2).sqrt()
    return torch.exp(-((distance - radius) ** 2))[:, None] * 2 - 1


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plugin = gemini.GeminiPlugin(precision="fp32", host_memory=options.host_memory, offload_dir=folder)
        booster = gemini.Booster(plugin=plugin)
        with gemini.LazyInitContext():
            model = DiT()
        optimizer = gemini.HybridAdam(model.parameters(), lr=2e-3)
        model, optimizer, *_ = booster.boost(model, optimizer)
        for step in range(1, 41):
            pictures, time = rings(32), torch.rand(32)
            noise = torch.randn_like(pictures)
            kept = torch.cos(time * math.pi / 2)[:, None, None, None]
            noisy = kept * pictures + (1 - kept**2).sqrt() * noise
            loss = functional.mse_loss(model(noisy, time), noise)
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0:
                print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
