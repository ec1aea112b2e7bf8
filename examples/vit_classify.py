"""Train a vision transformer on pictures made up on the spot: which quarter of the picture is bright?

python examples/vit_classify.py
python examples/vit_classify.py --host-memory 3MiB
"""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from transformers import ViTConfig, ViTForImageClassification

import gemini

CONFIG = ViTConfig(
    image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192,
    num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host-memory", help='bound on the model data in RAM, such as "3MiB"; the rest is on disk')
    return parser.parse_args(arguments)


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one bright quarter each, and which one that is."""
    quarters = torch.randint(4, (count,))
    noise = torch.randn(count, 3, 32, 32)
    for picture, quarter in zip(noise, quarters.tolist(), strict=True):
        row, column = divmod(quarter, 2)
        picture[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 0.5
    return noise, quarters


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plugin = gemini.GeminiPlugin(precision="fp32", host_memory=options.host_memory, offload_dir=folder)
        booster = gemini.Booster(plugin=plugin)
        with gemini.LazyInitContext():
            model = ViTForImageClassification(CONFIG)
        optimizer = gemini.HybridAdam(model.parameters(), lr=1e-3)
        model, optimizer, *_ = booster.boost(model, optimizer)
        for step in range(1, 21):
            pixels, labels = pictures(32)
            loss = model(pixel_values=pixels, labels=labels).loss
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step} loss {loss.item():.4f}")
        pixels, labels = pictures(128)
        with torch.no_grad():
            right = (model.eval()(pixel_values=pixels).logits.argmax(1) == labels).float().mean().item()
        print(f"test accuracy {right:.2f}")


if __name__ == "__main__":
    main()
