"""A LightningModule that is fitted plain or managed, and what has to be equal then."""

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from gemini.booster.plugin import GeminiPlugin
from gemini.integrations.lightning import GeminiStrategy

SMALL = {"chunk_config_dict": {1: {"chunk_size": 4096}}}
PLACES: dict[str, dict[str, Any]] = {
    "default": {},
    "streamed": {"device_memory": "52KiB", "host_memory": "1GiB", **SMALL},
    "disk": {"host_memory": "150KiB", "disk_memory": "100MiB", **SMALL},
}


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.register_buffer("scale", torch.ones(()))
        self.seen: list[Any] = []

    def loss(self, batch: Any) -> Tensor:
        loss = (self.net(batch[0]) * self.scale).square().mean()
        self.seen.append(loss.item())
        return loss

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation", self.loss(batch))

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0])  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        biases = [p for p in self.parameters() if p.ndim == 1]
        matrices = [p for p in self.parameters() if p.ndim > 1]
        return AdamW([{"params": biases, "weight_decay": 0.0}, {"params": matrices}], lr=1e-2, fused=True)


def data() -> Any:
    return DataLoader(TensorDataset(torch.randn(24, 16, generator=torch.Generator().manual_seed(1))), batch_size=4)


class Fitting:
    """Fits plain (``place`` None) or managed."""

    def __init__(self, place: str | None, folder: Path) -> None:
        self.place = place
        self.folder = folder

    def trainer(self, plugin: dict[str, Any] | None = None, **changes: Any) -> Any:
        fixed = {
            "max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False,
            "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": self.folder,
            "num_sanity_val_steps": 0,
        }  # fmt: skip
        strategy: Any = "auto"
        if self.place is not None:
            disk = {"offload_dir": self.folder} if self.place == "disk" else {}
            options = {"precision": "fp32", "telemetry": False, **PLACES[self.place], **disk, **(plugin or {})}
            strategy = GeminiStrategy(GeminiPlugin(**options))
        return lightning.Trainer(strategy=strategy, **{**fixed, **changes})

    def fit(self, module: Any, **changes: Any) -> Any:
        trainer = self.trainer(**changes)
        trainer.fit(module, data(), data())
        return trainer


def check_equal(ours: Any, plain: Any) -> None:
    assert len(plain.seen) > 0
    assert ours.seen == plain.seen
    expected = plain.state_dict()
    assert not [name for name, value in ours.state_dict().items() if not torch.equal(value, expected[name])]
