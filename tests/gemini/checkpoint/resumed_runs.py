"""Runs that are saved and gone on with: a model that draws random numbers, a scheduler, and a shuffled loader."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam

PRECISIONS = ("fp32", "bf16", "fp16")
SOURCES = ("checkpoint", "parts", "file")
"""One of `booster.save`; a model and an optimizer saved by themselves; the same with an optimizer's ``.pt``."""
VOCABULARY = 48


class Model(nn.Module):
    """Embedding and output are tied; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        blocks = (
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 32), nn.LayerNorm(32))
            for _ in range(8)
        )
        self.body = nn.Sequential(*blocks, nn.Dropout(0.1))
        self.out = nn.Linear(32, VOCABULARY, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.out(self.body(self.embedding(tokens)))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


class Run:
    """All that a run consists of. With ``disk`` the device is emulated and the masters do not fit into RAM."""

    def __init__(self, precision: str, seed: int = 0, disk: Path | None = None, lazy: bool = False) -> None:
        options: dict[str, Any] = {"chunk_config_dict": {1: {"chunk_size": 6144}}}
        if disk is not None:
            options = {"device_memory": "64KiB", "host_memory": "288KiB", "offload_dir": disk}
            options["chunk_config_dict"] = {1: {"chunk_size": 4096}}
        torch.manual_seed(seed)
        if lazy:
            with LazyInitContext():
                model: Any = Model()
        else:
            model = Model()
        self.booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, max_norm=1.0, **options))
        optimizer = HybridAdam(model.parameters(), lr=1e-2, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer, lr_scheduler=self.scheduler)
        generator = torch.Generator().manual_seed(9)
        data = [torch.randint(0, VOCABULARY, (12,), generator=generator) for _ in range(20)]
        self.loader = self.booster.plugin.prepare_dataloader(data, 2, shuffle=True)
        self._batches = iter(self.loader)

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler, "dataloader": self.loader
        }  # fmt: skip

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.model(next(self._batches))
            self.booster.backward(loss, self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(float(loss.detach()))
        return losses

    def save(self, folder: Path) -> None:
        """In each of the forms."""
        self.booster.save(folder / "checkpoint", **self.parts, size_per_shard="4KiB")
        self.booster.save_model(self.model, folder, shard=True, size_per_shard="20KiB")
        self.booster.save_optimizer(self.optimizer, folder, shard=True, size_per_shard="20KiB")
        self.booster.save_optimizer(self.optimizer, folder / "optimizer.pt")
        self.booster.save_lr_scheduler(self.scheduler, folder / "scheduler.pt")
        torch.save((self.loader.state_dict(), torch.get_rng_state()), folder / "others.pt")

    def load(self, folder: Path, source: str) -> None:
        if source == "checkpoint":
            self.booster.load(folder / "checkpoint", **self.parts)
        else:
            self.booster.load_model(self.model, folder)
            self.booster.load_optimizer(self.optimizer, folder if source == "parts" else folder / "optimizer.pt")
            self.booster.load_lr_scheduler(self.scheduler, folder / "scheduler.pt")
            position, random_state = torch.load(folder / "others.pt")
            self.loader.load_state_dict(position)
            torch.set_rng_state(random_state)
        self._batches = iter(self.loader)
