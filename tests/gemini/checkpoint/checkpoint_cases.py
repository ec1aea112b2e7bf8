"""Small models, boosted in different ways, and child processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
VOCABULARY = 96


def gpt2(seed: int = 0, cls: str = "GPT2LMHeadModel", **changes: Any) -> nn.Module:
    """Tied: ``lm_head.weight`` is ``transformer.wte.weight``."""
    import transformers

    options = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": VOCABULARY, "n_positions": 32}
    config = transformers.GPT2Config(**{**options, "bos_token_id": 0, "eos_token_id": 0, **changes})
    torch.manual_seed(seed)
    return getattr(transformers, cls)(config)


def llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def mixtral(seed: int = 0) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=11, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return MixtralForCausalLM(config)


class Mixed(nn.Module):
    """Everything a state dict may hold: ties, buffers of both kinds, float64, frozen, channels_last, scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 5)
        self.second = nn.Linear(8, 5)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        return (self.first(x) + self.second(x)).sum() * self.scale + self.wide.sum().to(x.dtype)


def mixed(seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed()


def boost(model: nn.Module, precision: str = "fp32", disk: Path | None = None, lr: float = 1e-2) -> tuple[Any, ...]:
    """Booster, model, optimizer; with ``disk`` the device is emulated and the masters do not fit into RAM."""
    options: dict[str, Any] = {}
    if disk is not None:
        options = {"device_memory": "128KiB", "host_memory": "288KiB", "offload_dir": disk}
        options["chunk_config_dict"] = {1: {"chunk_size": 4096}}
    booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **options))
    trainable = [p for p in model.parameters() if p.requires_grad]
    model, optimizer, *_ = booster.boost(model, HybridAdam(trainable, lr=lr, weight_decay=0.1))
    return booster, model, optimizer


def tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))


def train(booster: Booster, model: nn.Module, optimizer: Any, steps: range, scheduler: Any = None) -> list[float]:
    """Losses of some steps of a language model in evaluation mode (without dropout)."""
    model.eval()
    losses = []
    for step in steps:
        loss = model(input_ids=tokens(step), labels=tokens(step)).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens(99)).logits


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names in the same order, same bits."""
    assert list(found) == list(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def child(script: str, *arguments: Any, timeout: float = 120, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run one of this folder's scripts."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "2"}
    # Memory that is freed goes back to the system at once, so that peaks can be measured.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done
