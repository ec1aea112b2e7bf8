"""Pretrain a Llama with static or automatic placement, and go on from a checkpoint.

python examples/llama_pretrain.py --save_dir checkpoint
python examples/llama_pretrain.py --load checkpoint --num_steps 40
torchrun --nproc-per-node 2 examples/llama_pretrain.py
"""

import argparse
import json
import resource
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reference_text import ByteWindows
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import gemini
from gemini.accelerator import get_accelerator
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.cluster import DistCoordinator
from gemini.lazy import LazyInitContext
from gemini.nn.lr_scheduler import CosineAnnealingWarmupLR
from gemini.nn.optimizer import HybridAdam
from gemini.utils import set_seed

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4},
    "100m": {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32},
    "7b": {},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", choices=MODELS, default="tiny", help="size of the model")
    parser.add_argument("-p", "--plugin", choices=("gemini_auto", "gemini"), default="gemini_auto")
    parser.add_argument("-b", "--batch_size", type=int, default=4, help="sequences in each micro-batch of each rank")
    parser.add_argument("-a", "--accumulation_steps", type=int, default=1, help="micro-batches in each step")
    parser.add_argument("-s", "--num_steps", type=int, default=20, help="the step to train up to")
    parser.add_argument("--total_steps", type=int, default=1000, help="the step at which the learning rate is lowest")
    parser.add_argument("--warmup_steps", type=int, default=4)
    parser.add_argument("-l", "--max_length", type=int, default=128, help="tokens in each sequence")
    parser.add_argument("-g", "--grad_checkpoint", action="store_true", help="recompute activations in backward")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--grad_clip", type=float, default=1.0, help="highest norm of all gradients")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--offload_optim_frac", type=float, default=0.0, help="of the plugin gemini only")
    parser.add_argument("--offload_param_frac", type=float, default=0.0, help="of the plugin gemini only")
    parser.add_argument("--host_memory", help='bound on the model data in RAM, for example "2GiB"')
    parser.add_argument("--offload_dir", help="folder for model data that RAM has no room for")
    parser.add_argument("--save_dir", type=Path, help="folder for a checkpoint when training ends")
    parser.add_argument("--load", type=Path, help="checkpoint to go on from")
    return parser.parse_args(arguments)


def make_plugin(options: argparse.Namespace) -> GeminiPlugin:
    kwargs: dict[str, Any] = {
        "precision": options.precision,
        "max_norm": options.grad_clip,
        "host_memory": options.host_memory,
        "offload_dir": options.offload_dir,
        "enable_gradient_accumulation": options.accumulation_steps > 1,
    }
    if options.plugin == "gemini_auto":
        return GeminiPlugin(placement_policy="auto", **kwargs)
    return GeminiPlugin(
        placement_policy="static",
        offload_optim_frac=options.offload_optim_frac,
        offload_param_frac=options.offload_param_frac,
        **kwargs,
    )


def build(options: argparse.Namespace) -> nn.Module:
    config = LlamaConfig(
        **MODELS[options.config],
        vocab_size=ByteWindows.vocab_size,
        max_position_embeddings=max(options.max_length, 2048),
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    with LazyInitContext(default_device=get_accelerator().get_current_device()):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    if options.grad_checkpoint:
        model.gradient_checkpointing_enable()
    return model


def micro_batches(loader: DataLoader[Any]) -> Iterator[dict[str, Tensor]]:
    device = get_accelerator().get_current_device()
    while True:
        for batch in loader:
            yield {name: value.to(device) for name, value in batch.items()}


def mean_over_ranks(value: Tensor, coordinator: DistCoordinator) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item() / coordinator.world_size


def save(folder: Path, step: int, booster: Booster, model: Any, optimizer: Any, lr_scheduler: Any, loader: Any) -> None:
    """All ranks come here: each has a part of the model."""
    booster.save_model(model, str(folder / "model"), shard=True)
    booster.save_optimizer(optimizer, str(folder / "optimizer"), shard=True)
    coordinator = DistCoordinator()
    if coordinator.is_master():
        booster.save_lr_scheduler(lr_scheduler, str(folder / "lr_scheduler"))
        running = {"step": step, "loader": loader.state_dict()}
        (folder / "running_states.json").write_text(json.dumps(running))
    coordinator.block_all()


def load(folder: Path, booster: Booster, model: Any, optimizer: Any, lr_scheduler: Any, loader: Any) -> int:
    """Any number of ranks may go on. Returns the step to begin with."""
    booster.load_model(model, str(folder / "model"))
    booster.load_optimizer(optimizer, str(folder / "optimizer"))
    booster.load_lr_scheduler(lr_scheduler, str(folder / "lr_scheduler"))
    running = json.loads((folder / "running_states.json").read_text())
    loader.load_state_dict(running["loader"])
    return int(running["step"])


def train_step(
    batches: Iterable[dict[str, Tensor]], count: int, booster: Booster, model: Any, optimizer: Any
) -> Tensor:
    """One step on micro-batches. Returns their mean loss on this rank."""
    total = torch.zeros((), device=get_accelerator().get_current_device())
    for batch in batches:
        loss = model(**batch).loss
        # Gradients are summed over micro-batches and ranks; this makes the mean of them.
        booster.backward(loss / (count * booster.plugin.dp_size), optimizer)
        total += loss.detach().float() / count
    optimizer.step()
    optimizer.zero_grad()
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    gemini.launch_from_torch()
    coordinator = DistCoordinator()
    set_seed(42)
    plugin = make_plugin(options)
    booster = Booster(plugin=plugin)

    micro_batches_of_step = options.accumulation_steps * plugin.dp_size
    dataset = ByteWindows(options.total_steps * micro_batches_of_step * options.batch_size, options.max_length)
    loader = plugin.prepare_dataloader(dataset, options.batch_size, drop_last=True)

    model: Any = build(options)
    numel = sum(parameter.numel() for parameter in model.parameters())
    coordinator.print_on_master(f"Model params: {numel / 1e6:.1f} M")
    optimizer: Any = HybridAdam(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    lr_scheduler: Any = CosineAnnealingWarmupLR(
        optimizer, options.total_steps, options.warmup_steps, eta_min=0.1 * options.lr
    )
    model, optimizer, _, loader, lr_scheduler = booster.boost(
        model, optimizer, dataloader=loader, lr_scheduler=lr_scheduler
    )
    first = 0
    if options.load is not None:
        first = load(options.load, booster, model, optimizer, lr_scheduler, loader)
        coordinator.print_on_master(f"Going on from step {first}")

    batches = micro_batches(loader)
    model.train()
    for step in tqdm(range(first, options.num_steps), desc="Step", disable=not coordinator.is_master()):
        of_step = islice(batches, options.accumulation_steps)
        total = train_step(of_step, options.accumulation_steps, booster, model, optimizer)
        lr_scheduler.step()
        loss = mean_over_ranks(total, coordinator)
        norm, rate = optimizer.get_grad_norm(), lr_scheduler.get_last_lr()[0]
        coordinator.print_on_master(f"Step {step} loss: {loss:.6f}, grad norm: {norm}, lr: {rate:.6f}")
    if options.save_dir is not None:
        save(options.save_dir, options.num_steps, booster, model, optimizer, lr_scheduler, loader)

    stats = model.memory_stats()
    peaks = ", ".join(f"{tier} {stats[f'{tier}/peak_bytes'] / 2**20:.1f} MiB" for tier in ("device", "host", "disk"))
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    coordinator.print_on_master(f"Peak of model data: {peaks}; of the process: {process:.0f} MiB")


if __name__ == "__main__":
    main()
