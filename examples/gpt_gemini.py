"""Pretrain a GPT-2 with Gemini, and show memory and speed of every step.

python examples/gpt_gemini.py
torchrun --nproc-per-node 2 examples/gpt_gemini.py
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
from reference_text import ByteWindows
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import gemini
from gemini.accelerator import get_accelerator
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.logging import disable_existing_loggers, get_dist_logger
from gemini.nn.optimizer import HybridAdam
from gemini.utils import MultiTimer, set_seed

MODELS = {
    "gpt2_tiny": {"n_embd": 128, "n_layer": 2, "n_head": 4},
    "gpt2_small": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2_medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2_xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "gpt2_10b": {"n_embd": 4096, "n_layer": 50, "n_head": 16},
}
UNCOUNTED_STEPS = 1  # the first one finds the plan for the others


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_type", choices=MODELS, default="gpt2_tiny")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in each step of each rank")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens in each sequence")
    parser.add_argument("--train_step", type=int, default=20, help="how many steps to train, at least 2")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--host_memory", help='bound on the model data in RAM, for example "2GiB"')
    parser.add_argument("--offload_dir", help="folder for model data that RAM has no room for")
    options = parser.parse_args(arguments)
    if options.train_step <= UNCOUNTED_STEPS:
        parser.error(f"--train_step must be more than {UNCOUNTED_STEPS}, got {options.train_step}")
    return options


class GPTLMLoss(nn.Module):
    """The mean loss of predicting each next token."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_fn(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def memory(model: nn.Module | None = None) -> str:
    """What the process takes, and model data by tier once the model is boosted."""
    parts = [f"process {psutil.Process().memory_info().rss / 2**20:.0f} MiB"]
    if model is not None:
        stats = model.memory_stats()
        parts += [f"{tier} {stats[f'{tier}/used_bytes'] / 2**20:.1f} MiB" for tier in ("device", "host", "disk")]
    return ", ".join(parts)


def endless(loader: Any) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    disable_existing_loggers()
    gemini.launch_from_torch()
    set_seed(123)
    logger = get_dist_logger()
    logger.info(f"{options.model_type}, batch size {options.batch_size}, {memory()}", ranks=[0])

    criterion: Any = GPTLMLoss()
    config = GPT2Config(
        **MODELS[options.model_type],
        vocab_size=ByteWindows.vocab_size,
        n_positions=options.seq_len,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    device = get_accelerator().get_current_device()
    model: Any
    with LazyInitContext(default_device=device):
        model = GPT2LMHeadModel(config)
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    numel = sum(parameter.numel() for parameter in model.parameters())
    optimizer: Any = HybridAdam(model.parameters(), lr=options.lr)

    plugin = GeminiPlugin(
        hidden_dim=config.n_embd,
        host_memory=options.host_memory,
        offload_dir=options.offload_dir,
    )
    booster = Booster(plugin=plugin)
    model, optimizer, criterion, _, _ = booster.boost(model, optimizer, criterion)
    logger.info(f"boosted {numel / 1e6:.1f} M parameters, {memory(model)}", ranks=[0])

    sequences = options.train_step * options.batch_size * plugin.dp_size
    loader = plugin.prepare_dataloader(
        ByteWindows(sequences, options.seq_len), options.batch_size, shuffle=True, drop_last=True, seed=42
    )
    # Forward and backward of one token are 6 floating-point operations a parameter, recomputing 2 more.
    operations = numel * options.batch_size * options.seq_len * (8 if options.checkpointing else 6)
    teraflops = []
    timers = MultiTimer()
    model.train()
    for step, batch in zip(range(options.train_step), endless(loader), strict=False):
        input_ids = batch["input_ids"].to(device)
        optimizer.zero_grad()
        timers.start("step")
        timers.start("forward")
        logits = model(input_ids, attention_mask=batch["attention_mask"].to(device)).logits
        loss = criterion(logits, input_ids)
        forward = timers.stop("forward", keep_in_history=False)
        timers.start("backward")
        booster.backward(loss / plugin.dp_size, optimizer)  # gradients are summed over ranks
        backward = timers.stop("backward", keep_in_history=False)
        timers.start("optimizer")
        optimizer.step()
        update = timers.stop("optimizer", keep_in_history=False)
        seconds = timers.stop("step", keep_in_history=False)
        if step >= UNCOUNTED_STEPS:
            teraflops.append(operations / seconds / 1e12)
        logger.info(
            f"[{step + 1}/{options.train_step}] loss: {loss.item():.4f}, step {seconds:.3f} s "
            f"(forward {forward:.3f} s, backward {backward:.3f} s, optimizer {update:.3f} s), {memory(model)}",
            ranks=[0],
        )
    logger.info(f"median {statistics.median(teraflops):.4f} TFLOP/s on each rank", ranks=[0])


if __name__ == "__main__":
    main()
