"""A managed Trainer's checkpoints are whole whatever stops it, streamed, and those that a plain one reads."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from operations import Counted, Dead, Killed, folder_in_memory, intercepted  # noqa: E402
from trainer_rig import Maker, arguments, differing, logged, model  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from gemini.booster import Booster  # noqa: E402
from gemini.checkpoint import Manifest  # noqa: E402
from gemini.errors import CheckpointError  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # libraries' own warnings
SAVING = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "max_steps": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Maker, Any]]:
    """A run that nothing has disturbed, with its checkpoints 2, 4 and 6."""
    maker = Maker("streamed", tmp_path_factory.mktemp("run"))
    trainer = maker.trainer(model(), arguments(maker.folder, **SAVING))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests
    trainer.train()
    torch.set_num_threads(threads)
    yield maker, trainer


def copy(run: Path, folder: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def resumed(folder: Path, checkpoint: Any = True, place: str | None = "default") -> Any:
    trainer = Maker(place, folder).trainer(model(), arguments(folder, **SAVING))
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.heavy)])
def test_killed_at_any_call_of_a_save_the_newest_checkpoint_is_whole(run, every: int) -> None:
    with folder_in_memory() as folder:
        _kill(*run, folder / "run", every)


def _kill(maker: Maker, trainer: Any, work: Path, every: int) -> None:
    counted = Counted()
    trainer.args.output_dir = str(work)

    def begin(*steps: int) -> None:
        shutil.rmtree(work, ignore_errors=True)
        copy(maker.folder, work, *steps)

    begin(2)
    with intercepted(work, counted):
        trainer._save_checkpoint(trainer.model, None)
    outcomes: Counter[str] = Counter()
    for steps in ((2,), (2, 6)):  # a new checkpoint, and one over another of the same step
        for n in [*range(0, len(counted.calls), every), len(counted.calls) - 1]:
            begin(*steps)
            with pytest.raises(Dead), intercepted(work, Killed(n)):
                trainer._save_checkpoint(trainer.model, None)
            newest = Path(get_last_checkpoint(str(work)))
            Manifest.read(newest).check(newest)
            outcomes[newest.name] += 1
    trainer._save_checkpoint(trainer.model, None)
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    assert outcomes["checkpoint-2"] and outcomes["checkpoint-6"], outcomes


@pytest.mark.parametrize("place", ["default", "disk", None])
def test_training_goes_on_bit_for_bit_also_in_a_plain_trainer(run, tmp_path: Path, place: str | None) -> None:
    maker, expected = run
    again = resumed(copy(maker.folder, tmp_path, 2), place=place)
    assert logged(again) == logged(expected)
    assert not differing(again.model, expected.model)


def test_an_interrupted_save_of_another_trainer_is_passed_over(run, tmp_path: Path, caplog) -> None:
    maker, expected = run
    copy(maker.folder, tmp_path, 2, 4)
    for name in ("manifest.json", "trainer_state.json", "optimizer.pt"):
        (tmp_path / "checkpoint-4" / name).unlink()
    again = resumed(tmp_path)
    assert not differing(again.model, expected.model)
    assert "checkpoint-4 is not a whole checkpoint" in caplog.text


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_damaged_file_is_an_error_before_anything_is_loaded(run, tmp_path: Path, file: str) -> None:
    maker, _ = run
    path = copy(maker.folder, tmp_path, 4) / "checkpoint-4" / file
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=file):
        resumed(tmp_path)


def test_files_of_two_checkpoints_are_not_mixed(run, tmp_path: Path) -> None:
    maker, _ = run
    copy(maker.folder, tmp_path, 2, 4)
    shutil.copy(tmp_path / "checkpoint-2" / "optimizer.pt", tmp_path / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        resumed(tmp_path)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()  # the ids of the states are left
    with pytest.raises(CheckpointError, match="was saved in another state of training"):
        resumed(tmp_path)


def test_the_layout_is_the_trainers_and_nothing_is_gathered(run, tmp_path: Path, monkeypatch) -> None:
    _, trainer = run

    def gathers(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("gathered")

    trainer.args.output_dir = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("gemini.checkpoint.names._read_values", gathers)
        patch.setattr("gemini.step.states.States.state_dict", gathers)
        trainer._save_checkpoint(trainer.model, None)
        trainer.save_model(str(tmp_path / "final"))
    ours = {path.name for path in (tmp_path / "run" / "checkpoint-6").iterdir()}
    plain = Maker(None, tmp_path / "plain").trainer(model(), arguments(tmp_path / "plain", **SAVING))
    plain.train()
    assert ours == {path.name for path in (tmp_path / "plain" / "checkpoint-6").iterdir()} | {"manifest.json"}
    read = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "final")
    assert not differing(trainer.model, read)


def test_the_booster_reads_a_trainers_checkpoint(run) -> None:
    maker, trainer = run
    booster = Booster(plugin=maker.plugin())
    other = model()
    decays = [[p for p in other.parameters() if p.dim() > 1], [p for p in other.parameters() if p.dim() == 1]]
    other, optimizer, *_ = booster.boost(other, torch.optim.AdamW([{"params": each} for each in decays]))
    booster.load(maker.folder / "checkpoint-6", model=other, optimizer=optimizer)
    assert not differing(other, trainer.model)
    assert optimizer.state_dict()["state"].keys() == trainer.optimizer.state_dict()["state"].keys()


def test_the_best_checkpoint_is_named_by_its_place_and_the_oldest_go(tmp_path: Path) -> None:
    asked = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    results = []
    for place in (None, "default"):
        maker = Maker(place, tmp_path / str(place))
        trainer = maker.trainer(
            model(), arguments(maker.folder, **asked), eval_dataset=maker.trainer(model()).train_dataset
        )
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.parent == maker.folder
        stored = json.loads((maker.folder / "checkpoint-6" / "trainer_state.json").read_text())
        assert stored["best_model_checkpoint"] == trainer.state.best_model_checkpoint
        results.append((best.name, sorted(path.name for path in maker.folder.iterdir() if path.is_dir())))
    assert results[0] == results[1]
