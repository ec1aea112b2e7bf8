"""Lightning's ``precision="bf16-mixed"``, and evaluation of a module that has not been fitted, in chunks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning_rig import Fitting, Module, check_equal, data  # noqa: E402

from gemini.boosted import boosted, is_boosted  # noqa: E402
from gemini.chunk import MASTER, Tier  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # lightning's own warnings


class Stepped(Module):
    """Lightning clips nothing for ``AdamW(fused=True)`` under mixed precision."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Deep(Module):
    """800 KiB of parameters."""

    def __init__(self) -> None:
        super().__init__()
        body = [nn.Linear(64, 64) for _ in range(48)]
        self.net = nn.Sequential(nn.Linear(16, 64), *body, nn.Linear(64, 16))


@pytest.mark.parametrize("place", ["default", "streamed", "disk"])
def test_mixed_over_fp32_parameters_is_lightnings_own_autocast(place: str, tmp_path: Path) -> None:
    plain, ours = Stepped(), Stepped()
    for module, fitting in ((plain, Fitting(None, tmp_path)), (ours, Fitting(place, tmp_path))):
        trainer = fitting.trainer(precision="bf16-mixed", gradient_clip_val=0.02)
        trainer.fit(module, data(), data())
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, data())
    check_equal(ours, plain)


def test_mixed_is_the_plugins_bf16(tmp_path: Path) -> None:
    asked, told = Module(), Module()
    for module, precision in ((asked, "bf16-mixed"), (told, "32-true")):
        Fitting("streamed", tmp_path).trainer({"precision": "bf16"}, precision=precision).fit(module, data(), data())
    check_equal(asked, told)
    assert boosted(asked.net).config.compute_dtype is torch.bfloat16


@pytest.mark.parametrize("place", ["default", "streamed", "disk"])
def test_a_module_is_evaluated_in_chunks_and_then_fitted(place: str, tmp_path: Path) -> None:
    results: list[Any] = []
    modules = Module(), Module()
    for module, fitting in zip(modules, (Fitting(None, tmp_path), Fitting(place, tmp_path)), strict=True):
        results.append(fitting.trainer().validate(module, data(), verbose=False))
        results.append(fitting.trainer().predict(module, data()))
        if fitting.place is not None:
            assert is_boosted(module.net)
            assert all(chunk.gradient is None for chunk in boosted(module.net).manager.chunks)
        fitting.fit(module)
    assert results[2] == results[0]
    assert all(map(torch.equal, results[3], results[1]))
    check_equal(modules[1], modules[0])


def test_a_module_larger_than_ram_is_evaluated(tmp_path: Path) -> None:
    ours, plain = Deep(), Deep()
    trainer = Fitting("disk", tmp_path).trainer({"host_memory": "400KiB"})
    found = trainer.validate(ours, data(), verbose=False)
    assert found == Fitting(None, tmp_path).trainer().validate(plain, data(), verbose=False)
    homes = [part for chunk in boosted(ours.net).manager.chunks for part in chunk.homes[MASTER].parts]
    assert any(part.tier is Tier.DISK for part in homes)


def test_updates_in_backward_leave_evaluation_as_it_is(tmp_path: Path) -> None:
    plain, ours = Module(), Module()
    Fitting(None, tmp_path).fit(plain)
    fitting = Fitting("streamed", tmp_path)
    fitting.trainer({"update_in_backward": True}).validate(Module(), data(), verbose=False)
    fitting.fit(ours, plugin={"update_in_backward": True})
    check_equal(ours, plain)


def test_a_wrong_number_of_processes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Fitting("default", tmp_path).trainer()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="environment variable WORLD_SIZE must be a whole number, got 'two'"):
        trainer.strategy.setup(trainer)
