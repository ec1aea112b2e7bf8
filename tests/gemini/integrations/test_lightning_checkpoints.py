"""Lightning's checkpoints are whole whatever stops a save, streamed, and the files that Lightning itself reads."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from gemini.booster.plugin import GeminiPlugin
from gemini.errors import CheckpointError

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import callbacks as callback  # noqa: E402
from lightning.pytorch.plugins.io import AsyncCheckpointIO  # noqa: E402
from operations import Counted, Dead, Killed, folder_in_memory, intercepted  # noqa: E402

from gemini.integrations.lightning import GeminiStrategy  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # lightning's own warnings


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=1e-2, fused=True)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def data() -> Any:
    return DataLoader(TensorDataset(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))), batch_size=4)


def trainer(folder: Path, *, is_managed: bool = True, **changes: Any) -> Any:
    fixed = {
        "max_epochs": 3, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False,
        "enable_model_summary": False, "default_root_dir": folder,
        "callbacks": [callback.ModelCheckpoint(folder / "saved", save_top_k=-1, save_last=True)],
    }  # fmt: skip
    options = {"precision": "fp32", "telemetry": False, "chunk_config_dict": {1: {"chunk_size": 512}}}
    strategy: Any = GeminiStrategy(GeminiPlugin(**options)) if is_managed else "auto"
    return lightning.Trainer(strategy=strategy, **{**fixed, **changes})


def fitted(folder: Path, checkpoint: Any = None, **options: Any) -> tuple[Any, Any]:
    module, made = Module(), trainer(folder, **options)
    made.fit(module, data(), ckpt_path=checkpoint)
    return made, module


def differing(ours: Any, theirs: Any) -> list[str]:
    expected = theirs.state_dict()
    return [name for name, value in ours.state_dict().items() if not torch.equal(value, expected[name])]


def test_killed_at_any_call_of_a_save_the_file_is_whole_and_training_goes_on_from_it(tmp_path: Path) -> None:
    _, expected = fitted(tmp_path / "whole")
    fitted(tmp_path / "first", max_epochs=1)
    second, _ = fitted(tmp_path / "second", max_epochs=2)
    old = tmp_path / "first" / "saved" / "last.ckpt"
    outcomes: Counter[int] = Counter()
    with folder_in_memory() as folder:
        counted, file = Counted(), folder / "last.ckpt"
        shutil.copy(old, file)
        with intercepted(folder, counted):
            second.save_checkpoint(file)
        for n in range(len(counted.calls)):
            shutil.rmtree(folder)
            folder.mkdir()
            shutil.copy(old, file)
            with pytest.raises(Dead), intercepted(folder, Killed(n)):
                second.save_checkpoint(file)
            step = torch.load(file, weights_only=True)["global_step"]
            if not outcomes[step]:
                _, module = fitted(tmp_path / f"from {step}", file)
                assert not differing(module, expected)
            outcomes[step] += 1
        second.save_checkpoint(folder / "other.ckpt")  # removes what those that were killed have left
        assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "other.ckpt"]
    assert list(outcomes) == [4, 8], outcomes


@pytest.mark.parametrize(("by", "on"), [(True, False), (False, True)], ids=["ours to plain", "plain to ours"])
def test_training_goes_on_from_one_kind_to_the_other(tmp_path: Path, by: bool, on: bool) -> None:
    _, expected = fitted(tmp_path / "whole", is_managed=False)
    fitted(tmp_path / "part", is_managed=by, max_epochs=1)
    _, module = fitted(tmp_path / "rest", tmp_path / "part" / "saved" / "last.ckpt", is_managed=on)
    assert not differing(module, expected)
    loaded = Module.load_from_checkpoint(tmp_path / "rest" / "saved" / "last.ckpt")
    assert not differing(loaded, expected)


def test_a_damaged_file_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    fitted(tmp_path, max_epochs=1)
    file = tmp_path / "saved" / "last.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged"):
        fitted(tmp_path / "again", file)


def test_nothing_is_gathered_and_hooks_see_and_change_what_is_saved(tmp_path: Path, monkeypatch) -> None:
    class Changing(Module):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            del checkpoint["state_dict"]["net.0.bias"]
            checkpoint["norm"] = checkpoint["state_dict"]["net.0.weight"].norm()

    def gathers(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("gathered")

    module, made = Changing(), trainer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("gemini.checkpoint.names._read_values", gathers)
        patch.setattr("gemini.step.states.States.state_dict", gathers)
        made.fit(module, data())
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert "net.0.bias" not in saved["state_dict"]
    assert torch.equal(saved["norm"], module.state_dict()["net.0.weight"].norm())


def test_a_users_own_checkpoint_plugin_gets_tensors(tmp_path: Path) -> None:
    _, plain = fitted(tmp_path / "plain")
    made, _ = fitted(tmp_path / "own", plugins=[AsyncCheckpointIO()])
    made.strategy.checkpoint_io.teardown()
    saved = torch.load(tmp_path / "own" / "saved" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in plain.state_dict().items())
