"""The adapters for Lightning, against the installed lightning."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gemini.boosted import boosted, is_boosted
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.filterwarnings("ignore")  # lightning's own, about workers and checkpoints
lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from gemini.integrations.lightning import GeminiStatsMonitor, GeminiStrategy  # noqa: E402


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        (inputs,) = batch
        loss = self.net(inputs).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = HybridAdam(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Two(Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)


def data() -> Any:
    return DataLoader(TensorDataset(torch.randn(32, 16, generator=torch.Generator().manual_seed(1))), batch_size=4)


def trainer(tmp_path: Path, strategy: Any = "auto", **changes: Any) -> Any:
    fixed = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    return lightning.Trainer(strategy=strategy, **{**fixed, **changes})


def strategy(**changes: Any) -> GeminiStrategy:
    return GeminiStrategy(GeminiPlugin(precision="fp32", telemetry=False), **changes)


def test_the_strategy_trains_as_lightning_alone_does(tmp_path: Path) -> None:
    plain, managed = Module(), Module()
    trainer(tmp_path).fit(plain, data())
    fitted = trainer(tmp_path, strategy())
    fitted.fit(managed, data())
    assert len(plain.losses) == 16
    assert managed.losses == plain.losses
    assert boosted(managed.net).step_count == 16
    for name, value in managed.net.state_dict().items():
        assert torch.equal(value, plain.net.state_dict()[name])
    assert fitted.optimizers[0].param_groups[0]["lr"] == 1e-2 / 4  # the scheduler steers the managed optimizer


def test_a_checkpoint_goes_on_where_it_ended(tmp_path: Path) -> None:
    straight, first, second = Module(), Module(), Module()
    trainer(tmp_path, strategy(), max_epochs=3).fit(straight, data())
    begun = trainer(tmp_path, strategy(), max_epochs=2)
    begun.fit(first, data())
    begun.save_checkpoint(tmp_path / "c.ckpt")
    trainer(tmp_path, strategy(), max_epochs=3).fit(second, data(), ckpt_path=tmp_path / "c.ckpt")
    assert first.losses + second.losses == straight.losses


def test_the_callback_logs_statistics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    monitor = GeminiStatsMonitor(every_n_steps=4, keys=("host/used_bytes", "step/count"))
    trainer(tmp_path, strategy(), logger=logger, callbacks=[monitor]).fit(Module(), data())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        logged = list(csv.DictReader(file))
    assert [float(row["memory/step/count"]) for row in logged] == [4, 8, 12, 16]
    assert "memory/host/peak_bytes" not in logged[0]
    with pytest.raises(ValueError, match="every_n_steps"):
        GeminiStatsMonitor(0)


@pytest.mark.parametrize(
    ("plugin", "changes", "message"),
    [
        ({"max_norm": 1.0}, {"gradient_clip_val": 1.0}, "clipped twice"),
        ({"update_in_backward": True}, {"gradient_clip_val": 1.0}, "cannot clip"),
        ({}, {"precision": "bf16-true"}, "precision='bf16-mixed'"),
        ({"precision": "fp16"}, {"precision": "bf16-mixed"}, "loss scale"),
        ({}, {"precision": "64-true"}, "precision="),
        ({"precision": "fp16"}, {}, "loss scale"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, plugin: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    ours = GeminiStrategy(GeminiPlugin(**{"precision": "fp32", "telemetry": False, **plugin}))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, ours, **changes).fit(Module(), data())


def test_one_of_several_ranks_is_refused_before_it_trains_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    module = Module()
    with pytest.raises(ValueError, match="GeminiStrategy trains in one process, and this is one of 2"):
        trainer(tmp_path, strategy()).fit(module, data())
    assert not is_boosted(module.net)


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    module = Module()
    module.automatic_optimization = False
    module.configure_optimizers = lambda: [HybridAdam(module.net[i].parameters()) for i in (0, 2)]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="configure_optimizers gave 2"):
        trainer(tmp_path, strategy()).fit(module, data())
    assert not is_boosted(module.net)


def test_a_part_that_is_named_is_managed_alone(tmp_path: Path) -> None:
    module = Two()
    module.configure_optimizers = lambda: HybridAdam(module.net.parameters(), lr=1e-2)  # type: ignore[method-assign]
    trainer(tmp_path, strategy(module="net")).fit(module, data())
    assert is_boosted(module.net)
    assert not is_boosted(module.head)


def test_it_is_registered_by_name(tmp_path: Path) -> None:
    assert isinstance(trainer(tmp_path, "gemini").strategy, GeminiStrategy)
