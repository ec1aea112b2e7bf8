"""What Lightning does with a managed module is what it does with a plain one: fitting again, clipping, by hand."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW, lr_scheduler

from gemini.boosted import is_boosted

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import callbacks as callback  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning_rig import PLACES, Fitting, Module, check_equal, data  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # lightning's own warnings


@pytest.fixture(params=PLACES)
def kinds(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Fitting, Fitting]:
    """Plain and managed."""
    return Fitting(None, tmp_path), Fitting(request.param, tmp_path)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_clip_val": 0.02, "accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
    ],
    ids=["as it is", "clipped by norm", "clipped by value"],
)
def test_a_module_is_fitted_twice(changes: dict[str, Any], kinds: tuple[Fitting, Fitting]) -> None:
    modules = [Module(), Module()]
    for kind, module in zip(kinds, modules, strict=True):
        for _ in range(2):
            kind.fit(module, **changes)
    check_equal(modules[1], modules[0])


def test_the_same_optimizer_and_scheduler_serve_two_fits(kinds: tuple[Fitting, Fitting]) -> None:
    modules = [Module(), Module()]
    for kind, module in zip(kinds, modules, strict=True):
        optimizer = module.configure_optimizers()
        returned = [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5)}]
        module.configure_optimizers = lambda returned=returned: returned
        for _ in range(2):
            kind.fit(module)
    check_equal(modules[1], modules[0])


class Hooked(Module):
    """Looks at gradients wherever Lightning lets it."""

    def note(self) -> None:
        self.seen.append([None if p.grad is None else p.grad.norm().item() for p in self.parameters()])

    def on_after_backward(self) -> None:
        self.note()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.02, gradient_clip_algorithm="norm")
        self.note()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note()


@pytest.mark.parametrize("place", ["default", "streamed"])
def test_hooks_see_the_gradients_of_a_plain_fit(place: str, tmp_path: Path) -> None:
    modules = [Hooked(), Hooked()]
    Fitting(None, tmp_path).fit(modules[0])
    Fitting(place, tmp_path).fit(modules[1])
    check_equal(modules[1], modules[0])


class Manual(Module):
    """Optimises by hand, in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.way = way

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        getattr(self, self.way)(optimizer, batch, index)
        self.seen.append([group["lr"] for group in optimizer.param_groups])

    def cleared_before(self, optimizer: Any, batch: Any, index: int) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def cleared_after(self, optimizer: Any, batch: Any, index: int) -> None:
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def accumulated(self, optimizer: Any, batch: Any, index: int) -> None:
        self.manual_backward(self.loss(batch))
        if index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    def toggled(self, optimizer: Any, batch: Any, index: int) -> None:
        self.toggle_optimizer(optimizer)
        self.cleared_before(optimizer, batch, index)
        self.untoggle_optimizer(optimizer)

    def closed(self, optimizer: Any, batch: Any, index: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        with optimizer.toggle_model():
            self.seen.append(optimizer.step(closure).item())

    def clipped(self, optimizer: Any, batch: Any, index: int) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.02, "norm")
        optimizer.step()

    def scheduled(self, optimizer: Any, batch: Any, index: int) -> None:
        self.cleared_after(optimizer, batch, index)
        optimizer.param_groups[0]["lr"] *= 0.9

    def unwrapped(self, optimizer: Any, batch: Any, index: int) -> None:
        self.cleared_before(self.optimizers(use_pl_optimizer=False), batch, index)

    def looked_at(self, optimizer: Any, batch: Any, index: int) -> None:
        self.cleared_before(optimizer, batch, index)
        self.seen.append(optimizer.state_dict()["state"][0]["exp_avg"].sum().item())


WAYS = [name for name in vars(Manual) if not name.startswith("_") and name != "training_step"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", WAYS)
def test_optimising_by_hand_is_that_of_lightning_alone(way: str, tmp_path: Path) -> None:
    modules = [Manual(way), Manual(way), Manual(way)]
    for place, module in zip((None, "streamed", "disk"), modules, strict=True):
        for _ in range(2):
            Fitting(place, tmp_path).fit(module, max_epochs=1)
    check_equal(modules[1], modules[0])
    check_equal(modules[2], modules[0])


SCHEDULES = {
    "by step": lambda o: [{"scheduler": lr_scheduler.OneCycleLR(o, 0.02, total_steps=100), "interval": "step"}],
    "one after the other": lambda o: [
        lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.5)], [1])
    ],
    "on a plateau": lambda o: [
        {"scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=9.0), "monitor": "validation"}
    ],
    "none": lambda o: [],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_and_groups_are_those_of_a_plain_fit(schedule: str, tmp_path: Path) -> None:
    rates = []
    modules = [Module(), Module()]
    for place, module in zip((None, "streamed"), modules, strict=True):
        net = module.net
        rest = [p for layer in list(net)[1:] for p in layer.parameters()]
        optimizer = torch.optim.SGD([{"params": net[0].parameters(), "lr": 1e-3}, {"params": rest}], lr=0.1)
        module.configure_optimizers = lambda o=optimizer: ([o], SCHEDULES[schedule](o))
        monitor = callback.LearningRateMonitor()
        Fitting(place, tmp_path).fit(module, max_epochs=3, logger=CSVLogger(tmp_path), callbacks=[monitor])
        rates.append(monitor.lrs)
    assert rates[1] == rates[0]
    check_equal(modules[1], modules[0])


def test_checkpoints_of_either_kind_are_gone_on_with(tmp_path: Path) -> None:
    straight, again, best = Module(), [], []
    Fitting(None, tmp_path).fit(straight, max_epochs=3)
    for place in (None, "disk"):
        module, saving = Module(), callback.ModelCheckpoint(tmp_path / str(place), monitor="validation", save_last=True)
        options = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [saving]}
        trainer = Fitting(place, tmp_path).trainer(**options)
        trainer.fit(module, data(), data())
        best.append((Path(saving.best_model_path).name, saving.best_model_score))
        resumed = Module()
        Fitting("disk", tmp_path).trainer(max_epochs=3).fit(
            resumed, data(), data(), ckpt_path=saving.last_model_path, weights_only=False
        )
        again.append(resumed)
        loaded = Module.load_from_checkpoint(saving.last_model_path, weights_only=False).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in module.state_dict().items())
    assert best[0] == best[1]
    for resumed in again:
        assert resumed.seen == straight.seen[-len(resumed.seen) :]
        assert torch.equal(resumed.state_dict()["net.0.weight"], straight.state_dict()["net.0.weight"])


def averaging() -> list[Any]:
    return [callback.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1), callback.EMAWeightAveraging(decay=0.9)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("index", [0, 1], ids=["of epochs", "of steps"])
def test_averages_of_weights_are_those_of_a_plain_fit(index: int, kinds: tuple[Fitting, Fitting]) -> None:
    modules = [Module(), Module()]
    for kind, module in zip(kinds, modules, strict=True):
        kind.fit(module, max_epochs=3, callbacks=[averaging()[index]])
    check_equal(modules[1], modules[0])


def test_validating_and_predicting_need_no_fit_and_may_come_before_and_after_one(tmp_path: Path) -> None:
    results = []
    for place in (None, "streamed"):
        module, found = Module(), []
        for fits in (False, True, False):
            trainer = Fitting(place, tmp_path).trainer()
            found += trainer.validate(module, data(), verbose=False)
            found += [torch.cat(trainer.predict(module, data())).sum().item()]
            if fits:
                trainer.fit(module, data(), data())
        results.append((found, module))
    assert results[1][0] == results[0][0]
    check_equal(results[1][1], results[0][1])
    assert is_boosted(results[1][1].net)


def test_without_an_optimizer_a_module_runs_as_it_is(tmp_path: Path) -> None:
    modules = [Module(), Module()]
    for place, module in zip((None, "default"), modules, strict=True):
        module.configure_optimizers = lambda: None  # type: ignore[method-assign]
        Fitting(place, tmp_path).fit(module)
    check_equal(modules[1], modules[0])
    assert not is_boosted(modules[1].net)


def test_updates_in_backward_are_fitted_twice(tmp_path: Path) -> None:
    modules = [Module(), Module()]
    for place, module in zip((None, "disk"), modules, strict=True):
        for _ in range(2):
            Fitting(place, tmp_path).fit(module, plugin={"update_in_backward": True})
    check_equal(modules[1], modules[0])


def test_layers_are_unfrozen_by_lightnings_own_callback(tmp_path: Path) -> None:
    class Gradual(callback.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=1e-3)

    modules = [Module(), Module()]
    for place, module in zip((None, "streamed"), modules, strict=True):
        trained = list(itertools.chain(*(layer.parameters() for layer in list(module.net)[1:])))
        module.configure_optimizers = lambda p=trained: AdamW(p, lr=1e-2, fused=True)
        Fitting(place, tmp_path).fit(module, callbacks=[Gradual()])
    check_equal(modules[1], modules[0])
