"""A loop of one's own with accelerate's `Accelerator`, and ours, over a boosted model: as over a plain one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from trainer_rig import PLACES, Maker, Tokens, differing, model  # noqa: E402

from gemini.booster import Booster  # noqa: E402
from gemini.booster.plugin import GeminiPlugin  # noqa: E402
from gemini.integrations.accelerator import ManagedAccelerator  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # libraries' own warnings
KINDS = [accelerate.Accelerator, ManagedAccelerator]


@pytest.fixture(autouse=True)
def _alone() -> None:
    """Accelerators of a process share what the first one was made with."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Loop:
    """accelerate's own example, with accumulation, clipping, a schedule, and a state that is saved and loaded."""

    def __init__(self, kind: Any, plugin: GeminiPlugin | None, mixed: str = "no") -> None:
        AcceleratorState._reset_state(True)
        self.accelerator = kind(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed)
        trained = model()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, fused=True)
        if plugin is not None:
            trained, optimizer, *_ = Booster(plugin=plugin).boost(trained, optimizer)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        loader = DataLoader(Tokens(), batch_size=2)
        self.parts = self.accelerator.prepare(trained, optimizer, loader, schedule)
        self.seen: list[float] = []

    @property
    def model(self) -> Any:
        return self.accelerator.unwrap_model(self.parts[0])

    def epoch(self) -> None:
        trained, optimizer, loader, schedule = self.parts
        for batch in loader:
            with self.accelerator.accumulate(trained):
                loss = trained(**batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.seen.append(float(self.accelerator.clip_grad_norm_(trained.parameters(), 0.05)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            self.seen.append(loss.item())
            self.seen.append(schedule.get_last_lr()[0])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mixed", ["no", "bf16"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_is_that_of_a_plain_model(kind: Any, place: str, mixed: str, tmp_path: Path) -> None:
    loops = [Loop(accelerate.Accelerator, None, mixed), Loop(kind, Maker(place, tmp_path).plugin(), mixed)]
    for number, loop in enumerate(loops):
        loop.epoch()
        loop.accelerator.save_state(str(tmp_path / str(number)))
        loop.epoch()
        loop.accelerator.load_state(str(tmp_path / str(number)))
        loop.epoch()
    assert loops[1].seen == loops[0].seen
    assert not differing(loops[1].model, loops[0].model)
    saved = [loop.accelerator.get_state_dict(loop.parts[0]) for loop in loops]
    assert not [name for name, value in saved[0].items() if not torch.equal(value, saved[1][name])]


def test_ours_scales_the_loss_in_fp16(tmp_path: Path) -> None:
    plugin = Maker("disk", tmp_path, precision="fp16", initial_scale=2.0**40, max_scale=2.0**40, hysteresis=1).plugin()
    loop = Loop(ManagedAccelerator, plugin)
    loop.epoch()
    assert loop.parts[1].step_was_skipped
    assert loop.parts[3].get_last_lr() == [1e-2]  # no step, and so the schedule waits
    steady = Loop(ManagedAccelerator, Maker("disk", tmp_path, precision="fp16").plugin())
    steady.epoch()
    assert not steady.parts[1].step_was_skipped
    assert steady.parts[3].get_last_lr() == [2.5e-3]


def test_accelerates_own_loss_scale_is_refused(tmp_path: Path) -> None:
    trained, *_ = Booster(plugin=Maker("default", tmp_path).plugin()).boost(model())
    accelerator = ManagedAccelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as with mixed_precision="fp16" on a GPU
    with pytest.raises(ValueError, match=r'give GeminiPlugin\(precision="fp16"\)'):
        accelerator.prepare(trained)


def test_what_is_prepared_first_is_refused_with_the_order(tmp_path: Path) -> None:
    trained = model()
    prepared = accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(trained.parameters()))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer around AdamW: boost the model with its optimizer first"):
        Booster(plugin=Maker("default", tmp_path).plugin()).boost(trained, prepared)


def test_moving_a_model_says_how_accelerate_leaves_it(tmp_path: Path) -> None:
    trained, *_ = Booster(plugin=Maker("default", tmp_path).plugin()).boost(model())
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.device = torch.device("meta")  # as one that the model's chunks are not on
    with pytest.raises(RuntimeError, match=r"ManagedAccelerator, or prepare it with device_placement=\[False"):
        accelerator.prepare(trained)
    assert accelerator.prepare(trained, device_placement=[False]) is trained


def test_distributed_data_parallel_is_refused_before_it_changes_anything(tmp_path: Path) -> None:
    trained, *_ = Booster(plugin=Maker("default", tmp_path).plugin()).boost(model())
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="cannot be within DistributedDataParallel"):
            torch.nn.parallel.DistributedDataParallel(trained)
    finally:
        torch.distributed.destroy_process_group()
    assert not [name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])]
