"""Text from the trained model, through the same managed memory as in training."""

import time

import torch
from torch import Tensor, nn

_TEMPERATURE = 0.7
_LIKELIEST = 40


def generate(
    model: nn.Module, prompt: bytes, length: int, *, context: int, seed: int, device: torch.device, limit_seconds: float
) -> bytes:
    """Continue ``prompt`` by up to ``length`` bytes; ends early when the time is up.

    Every byte is a forward of the whole context. A cache of keys and values would save arithmetic, of which there is
    little; what takes the time is streaming the weights, and a cache does not save that.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=device)
    was_training = model.training
    model.eval()
    deadline = time.monotonic() + limit_seconds
    try:
        with torch.no_grad():
            for _ in range(length):
                logits = model(tokens[:, -context:])[0, -1].float().cpu()
                tokens = torch.cat([tokens, _sample(logits, generator).to(device)], dim=1)
                if time.monotonic() > deadline:
                    break
    finally:
        model.train(was_training)
    return bytes(tokens[0].tolist())[len(prompt) :]


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    values, indices = logits.topk(min(_LIKELIEST, logits.numel()))
    chosen = torch.multinomial(torch.softmax(values / _TEMPERATURE, dim=0), 1, generator=generator)
    return indices[chosen].view(1, 1)
