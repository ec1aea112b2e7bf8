"""LightningModules whose parameters are in several submodules, or in the LightningModule itself, are boosted whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from gemini.boosted import boosted, is_boosted
from gemini.booster.plugin import GeminiPlugin

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import callbacks as callback  # noqa: E402

from gemini.integrations.lightning import GeminiStrategy  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # lightning's own warnings

SMALL = {"chunk_config_dict": {1: {"chunk_size": 4096}}}
PLACES: dict[str, dict[str, Any]] = {
    "default": {},
    "streamed": {"device_memory": "52KiB", "host_memory": "1GiB", **SMALL},
    "disk": {"host_memory": "300KiB", "disk_memory": "100MiB", **SMALL},
}


class AutoEncoder(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """As in Lightning's introduction; beside it a parameter and a buffer of its own."""

    def __init__(self, is_manual: bool = False, loss: str = "by_parts") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64))
        self.decoder = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("shift", torch.ones(()))
        self.automatic_optimization = not is_manual
        self.loss = loss
        self.seen: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.encoder(inputs)) * self.scale

    def by_parts(self, inputs: Tensor) -> Tensor:
        hidden = self.encoder(inputs.view(inputs.size(0), -1))
        return nn.functional.mse_loss(self.decoder(hidden) * self.scale, inputs + self.shift)

    def by_call(self, inputs: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(inputs), inputs)

    def by_both(self, inputs: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(inputs), self.encoder(inputs)[:, :16])

    def by_two_calls(self, inputs: Tensor) -> Tensor:
        return (self.by_parts(inputs) + self.by_parts(inputs * 2)) / self.scale.square().mean()

    def without_the_decoder(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs).square().mean()

    def training_step(self, batch: Any, index: int) -> Any:
        loss = getattr(self, self.loss)(batch[0])
        self.log("train", loss)
        self.seen.append(loss.item())
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.02, "norm")
        optimizer.step()
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation", self(batch[0]).mean())
        self.seen.append(self.by_parts(batch[0]).item())

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-2, fused=True)


class Bare(AutoEncoder):
    """Parameters of its own alone."""

    def __init__(self) -> None:
        super().__init__()
        del self.encoder, self.decoder
        self.first = nn.Parameter(torch.randn(64, 16) / 4)
        self.second = nn.Parameter(torch.randn(16, 64) / 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs @ self.first.T).relu() @ self.second.T * self.scale

    def by_parts(self, inputs: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(inputs), inputs + self.shift)


def data() -> Any:
    return DataLoader(TensorDataset(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))), batch_size=4)


def fit(module: Any, place: str | None, folder: Path, *, checkpoint: Any = None, **changes: Any) -> Any:
    fixed = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
        "num_sanity_val_steps": 1,
    }  # fmt: skip
    strategy: Any = "auto"
    if place is not None:
        disk = {"offload_dir": folder} if place == "disk" else {}
        strategy = GeminiStrategy(GeminiPlugin(precision="fp32", telemetry=False, **PLACES[place], **disk))
    trainer = lightning.Trainer(strategy=strategy, **{**fixed, **changes})
    trainer.fit(module, data(), data(), ckpt_path=checkpoint)
    return trainer


def check_equal(ours: Any, plain: Any) -> None:
    assert is_boosted(ours)
    assert len(plain.seen) > 4
    assert ours.seen == plain.seen
    expected = plain.state_dict()
    assert not [name for name, value in ours.state_dict().items() if not torch.equal(value, expected[name])]


KINDS: dict[str, Callable[[], Any]] = {
    "by parts": AutoEncoder,
    "by hand": lambda: AutoEncoder(is_manual=True),
    "by call": lambda: AutoEncoder(loss="by_call"),
    "by both": lambda: AutoEncoder(loss="by_both"),
    "by two calls": lambda: AutoEncoder(is_manual=True, loss="by_two_calls"),
    "with an unused part": lambda: AutoEncoder(loss="without_the_decoder"),
    "parameters of its own": Bare,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_fitting_twice_is_that_of_lightning_alone(kind: str, place: str, tmp_path: Path) -> None:
    modules = [KINDS[kind](), KINDS[kind]()]
    predictions = []
    for module, where in zip(modules, (None, place), strict=True):
        for _ in range(2):
            options = {} if not module.automatic_optimization else {"gradient_clip_val": 0.05}
            trainer = fit(module, where, tmp_path, accumulate_grad_batches=1, **options)
        predictions.append(torch.cat(trainer.predict(module, data())))
    check_equal(modules[1], modules[0])
    assert torch.equal(*predictions)
    assert boosted(modules[1]).step_count == 16


def test_checkpoints_of_either_kind_are_gone_on_with(tmp_path: Path) -> None:
    found = []
    for saved, resumed in ((None, None), (None, "disk"), ("disk", "streamed"), ("streamed", None)):
        first, second = AutoEncoder(), AutoEncoder()
        path = tmp_path / f"{saved}.ckpt"
        fit(first, saved, tmp_path).save_checkpoint(path)
        fit(second, resumed, tmp_path, max_epochs=3, checkpoint=path)
        found.append((first.seen + second.seen, second.state_dict()))
    for seen, state in found[1:]:
        assert seen == found[0][0]
        assert not [name for name, value in state.items() if not torch.equal(value, found[0][1][name])]


def test_averages_and_frozen_parts_are_those_of_a_plain_fit(tmp_path: Path) -> None:
    modules = [AutoEncoder(), AutoEncoder()]
    for module, place in zip(modules, (None, "disk"), strict=True):
        module.encoder[0].requires_grad_(False)
        fit(module, place, tmp_path, callbacks=[callback.EMAWeightAveraging(decay=0.9)])
    check_equal(modules[1], modules[0])


def test_in_bf16_batches_come_in_bf16(tmp_path: Path) -> None:
    plugin = {"precision": "bf16", "telemetry": False}
    seen = []
    for name in (None, ""):
        module = AutoEncoder(loss="by_call")
        strategy = GeminiStrategy(GeminiPlugin(**plugin), module=name)
        options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(strategy=strategy, max_epochs=2, enable_model_summary=False, **options)
        trainer.fit(module, data())
        assert boosted(module).config.precision == "bf16"
        seen.append(module.seen)
    # The same in plain PyTorch: the whole module in bf16, with fp32 masters that AdamW updates.
    module = AutoEncoder()
    masters = [p.detach().clone() for p in module.parameters()]
    module.bfloat16()
    optimizer, losses = AdamW(masters, lr=1e-2, fused=True), []
    for _ in range(2):
        for (batch,) in data():
            inputs = batch.bfloat16()
            loss = nn.functional.mse_loss(module(inputs), inputs)
            losses.append(loss.item())
            module.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter, master in zip(module.parameters(), masters, strict=True):
                    assert parameter.grad is None or parameter.grad.dtype is torch.bfloat16
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                optimizer.step()
                for parameter, master in zip(module.parameters(), masters, strict=True):
                    parameter.copy_(master)
    assert seen == [losses, losses]
