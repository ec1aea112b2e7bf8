"""Which checkpoint of a folder is loaded, whatever else is in it, and what is refused."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same, boost, gpt2, logits, values
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from gemini.booster import Booster
from gemini.checkpoint import save_lora, save_optimizer
from gemini.checkpoint.manifest import Manifest
from gemini.errors import CheckpointError


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def saved(folder: Path, count: int = 2, **options: Any) -> list[Path]:
    """Some checkpoints, of models that differ; each says its number."""
    return [Booster().save(folder, model=linear(n), extra=n, **options) for n in range(1, count + 1)]


def load(path: Path, **options: Any) -> Any:
    """The number of the checkpoint that is loaded; the model is the one of that number, or has not changed."""
    model = linear(seed=99)
    before = values(model)
    try:
        number = Booster().load(path, model=model, **options)
    except CheckpointError:
        assert_same(values(model), before)
        raise
    assert_same(values(model), values(linear(number)))
    return number


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 4
    file.write_bytes(data)


def test_foreign_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-000007", "checkpoint-1", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / "latest.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"checkpoint-000007 is not a whole checkpoint: it has no manifest.json"):
        load(tmp_path)
    assert saved(tmp_path, 3, keep=1)[-1].name == "checkpoint-000010"
    assert load(tmp_path) == 3
    assert len(list(tmp_path.rglob("notes.txt"))) == 4


@pytest.mark.parametrize("latest", ["missing", "stale", "dangling", "text", "folder"])
def test_the_newest_one_is_found_without_latest(tmp_path: Path, latest: str) -> None:
    saved(tmp_path)
    (tmp_path / "latest").unlink()
    if latest in ("stale", "dangling"):
        (tmp_path / "latest").symlink_to("checkpoint-000001" if latest == "stale" else "checkpoint-000009")
    elif latest == "text":
        (tmp_path / "latest").write_text("checkpoint-000001\n")
    elif latest == "folder":
        (tmp_path / "latest").mkdir()
    assert load(tmp_path) == 2
    if latest != "folder":
        assert load(tmp_path / "latest") == 2
    assert saved(tmp_path, 1)[0].name == "checkpoint-000003"
    if latest != "folder":
        assert os.readlink(tmp_path / "latest") == "checkpoint-000003"


def test_links_to_a_folder_of_checkpoints_or_to_one_are_followed(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    (tmp_path / "latest").symlink_to("run")
    (tmp_path / "best").symlink_to("run/checkpoint-000001")
    assert load(tmp_path / "latest") == 2
    assert load(tmp_path / "best") == 1


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    booster = Booster()
    booster.save_model(linear(), tmp_path / "weights")
    (tmp_path / "begun" / ".checkpoint.saving-12345678").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint-000003").mkdir()
    for name, words in {
        "weights": "holds no checkpoint of booster.save; load_model and load_optimizer read its model.safetensors",
        "begun": "holds no checkpoint of booster.save; a save into it has not ended",
        "empty": "holds no checkpoint of booster.save$",
        "none": "there is no such folder",
        "checkpoint-000003": "is not a whole checkpoint: it has no manifest.json",
        "weights/model.safetensors": "there is no such folder",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}:? .*{words}"):
            load(tmp_path / name)


@pytest.mark.parametrize("file", ["model.safetensors", "extra.pt", "manifest.json", "rng-00000.pt"])
def test_a_damaged_one_is_never_replaced_by_an_older_one(tmp_path: Path, file: str) -> None:
    saved(tmp_path, 3)
    flip(tmp_path / "checkpoint-000002" / "model.safetensors", -1)
    flip(tmp_path / "checkpoint-000003" / file, -20)
    with pytest.raises(CheckpointError, match=rf"{file}.*checkpoint-000001 is whole: give it by its name") as caught:
        load(tmp_path)
    assert "checkpoint-000002" not in str(caught.value)
    assert load(tmp_path / "checkpoint-000001") == 1


@pytest.mark.parametrize("file", ["model.safetensors", "extra.pt", "rng-00000.pt", "manifest.json"])
def test_a_file_that_is_gone_or_cut_off_is_named_also_without_verifying(tmp_path: Path, file: str) -> None:
    (path,) = saved(tmp_path, 1)
    os.truncate(path / file, (path / file).stat().st_size - 2)  # the last byte of a manifest means nothing
    for _ in range(2):
        with pytest.raises(CheckpointError, match=file):
            load(tmp_path, verify=False)
        (path / file).unlink(missing_ok=True)


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    whole, data = Manifest.read(path), (path / "manifest.json").read_bytes()
    for byte in range(len(data)):
        damaged = bytearray(data)
        damaged[byte] ^= 1 << byte % 8
        (path / "manifest.json").write_bytes(damaged)
        try:
            assert Manifest.read(path) == whole  # a blank became another one
        except CheckpointError as error:
            assert "manifest.json" in str(error)


def test_runs_that_save_into_one_folder_at_the_same_time_have_numbers_of_their_own(tmp_path: Path) -> None:
    found: list[Path] = []
    start = threading.Barrier(4)

    def save() -> None:
        start.wait(timeout=30)
        found.extend(Booster().save(tmp_path, model=linear(), keep=None) for _ in range(3))

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(path.name for path in found) == [f"checkpoint-{n:06d}" for n in range(1, 13)]
    assert not list(tmp_path.glob(".*"))


def test_a_relative_folder_is_where_it_was_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (path,) = saved(Path("runs/a"), 1)
    assert path == tmp_path / "runs" / "a" / "checkpoint-000001"
    assert load(Path("runs/a")) == 1


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/x cannot be written to"):
        saved(tmp_path / "file" / "x")
    (path,) = saved(tmp_path / "good", 1)
    with pytest.raises(ValueError, match=r"checkpoint-000001 is a checkpoint, and stays as it is: give .*good"):
        saved(path)


def test_nothing_is_written_into_a_committed_checkpoint(tmp_path: Path) -> None:
    booster, model, optimizer = boost(linear(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    plain = torch.optim.SGD(linear().parameters(), lr=0.1)
    adapted = get_peft_model(nn.Sequential(linear()), LoraConfig(target_modules=["0"]))
    named = booster.save(tmp_path / "a", model={"it": model}, optimizer={"it": optimizer})
    (tmp_path / "link").symlink_to(named, target_is_directory=True)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    for folder in (named, named.with_name("latest"), named / "it", tmp_path / "link", named / "new" / "one"):
        for save in (
            lambda: booster.save_model(model, folder),  # noqa: B023
            lambda: booster.save_model(model, folder / "model.safetensors", use_async=True),  # noqa: B023
            lambda: booster.save_optimizer(optimizer, folder, use_async=True),  # noqa: B023
            lambda: save_optimizer(plain, folder / "optimizer.pt"),  # noqa: B023
            lambda: booster.save_lr_scheduler(scheduler, folder / "lr_scheduler.pt"),  # noqa: B023
            lambda: save_lora(adapted, folder),  # noqa: B023
            lambda: booster.save(folder, model=model),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="checkpoint-000001 is a checkpoint, and stays as it is: give"):
                save()
    with pytest.raises(ValueError, match="checkpoint-000001 is a checkpoint, and stays as it is"):
        booster.save_lr_scheduler(scheduler, named.with_name("latest"))
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    assert (tmp_path / "a" / "latest").is_symlink()


def test_a_manifest_of_somebody_else_makes_no_checkpoint_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    Booster().save_model(linear(), tmp_path / "weights")
    Booster().save_model(linear(), tmp_path)
    with pytest.raises(ValueError, match=r"has a manifest\.json of something else: give a folder of its own"):
        saved(tmp_path)
    assert (tmp_path / "weights" / "model.safetensors").is_file()


def test_parts_that_are_not_there_are_an_error_unless_they_may_be(tmp_path: Path) -> None:
    booster, model, optimizer = boost(linear(1))
    booster.save(tmp_path, model=model)
    other_booster, other, optimizer = boost(linear(2))
    before = values(other)
    with pytest.raises(CheckpointError, match=r"has no optimizer; it has model, rng '00000'. Nothing was changed"):
        other_booster.load(tmp_path, model=other, optimizer=optimizer)
    assert_same(values(other), before)
    other_booster.load(tmp_path, model=other, optimizer=optimizer, strict=False)
    assert_same(values(other), values(model))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"keep": 0}, ValueError, "keep must be None or a whole number of 1 or more, got 0"),
        ({"keep": True}, TypeError, "keep must be None or a whole number of 1 or more, got True"),
        ({"size_per_shard": 0}, ValueError, "size_per_shard must be a whole number of MiB, 1 or more"),
        ({"model": [nn.Linear(1, 1)]}, TypeError, "give several as a dict"),
        ({"model": {"a/b": nn.Linear(1, 1)}}, ValueError, "becomes the name of a folder"),
        ({"model": {"a.b": nn.Linear(1, 1)}}, ValueError, "becomes the name of a folder"),
        ({"model": torch.optim.SGD([torch.ones(1)])}, TypeError, r"must be a torch.nn.Module"),
        ({"optimizer": nn.Linear(1, 1)}, TypeError, r"must be a torch.optim.Optimizer"),
        ({"dataloader": DataLoader([1])}, TypeError, r"booster.plugin.prepare_dataloader"),
        ({"extra": {"a": [object()]}}, CheckpointError, r"extra\['a'\]\[0\] is of type object"),
        ({"extra": {Path("a"): 1}}, CheckpointError, r"a key of extra is of type PosixPath"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Booster().save(tmp_path / "folder", **given)
    assert not (tmp_path / "folder").exists() or not list((tmp_path / "folder").iterdir())


def test_a_loader_that_does_not_take_its_state_changes_nothing(tmp_path: Path) -> None:
    booster, model, optimizer = boost(linear(1))
    prepare = booster.plugin.prepare_dataloader
    loaders = {"a": prepare([1, 2, 3, 4], 1), "b": prepare([1, 2, 3], 1)}
    for loader in loaders.values():
        next(iter(loader))
    booster.save(tmp_path, model=model, optimizer=optimizer, dataloader=loaders)
    booster, other, optimizer = boost(linear(2))
    fresh = {"a": prepare([1, 2, 3, 4], 1), "b": prepare([1, 2], 1)}
    before, drawn = values(other), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"b/dataloader-00000.pt does not fit the dataloader 'b'"):
        booster.load(tmp_path, model=other, optimizer=optimizer, dataloader=fresh)
    assert_same(values(other), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert fresh["a"].state_dict()["taken"] == 0
    booster.load(tmp_path, dataloader={"a": fresh["a"]})
    assert fresh["a"].state_dict()["taken"] == 1


def test_optimizers_that_json_cannot_hold_are_saved_too(tmp_path: Path) -> None:
    plain = linear(1)
    theirs = torch.optim.Adagrad(plain.parameters(), lr=0.1)
    plain(torch.ones(1, 4)).sum().backward()
    theirs.step()
    booster, model, optimizer = boost(linear(2))
    optimizer.param_groups[0]["note"] = torch.arange(3)
    path = booster.save(tmp_path, model={"a": plain, "b": model}, optimizer={"a": theirs, "b": optimizer})
    assert (path / "a" / "optimizer.pt").is_file() and (path / "b" / "optimizer.pt").is_file()
    other = torch.optim.Adagrad(linear(3).parameters())
    booster.load(tmp_path, optimizer={"a": other, "b": optimizer})
    assert other.param_groups[0]["lr"] == 0.1
    assert_same(other.state_dict()["state"][0], theirs.state_dict()["state"][0])


def test_random_numbers_go_on_where_they_were_unless_that_is_not_wanted(tmp_path: Path) -> None:
    torch.manual_seed(3)
    saved_at = torch.get_rng_state()
    booster = Booster()
    booster.save(tmp_path)
    assert torch.equal(torch.get_rng_state(), saved_at)
    torch.manual_seed(4)
    booster.load(tmp_path, rng=False)
    assert not torch.equal(torch.get_rng_state(), saved_at)
    booster.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), saved_at)


def test_transformers_and_load_model_read_the_model_of_a_checkpoint(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    booster, model, optimizer = boost(gpt2())
    booster.save(tmp_path, model=model, optimizer=optimizer, size_per_shard="20KiB")
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "latest")), logits(gpt2()))
    for path in (tmp_path, tmp_path / "latest", tmp_path / "checkpoint-000001"):
        booster, other, optimizer = boost(gpt2(seed=1))
        booster.load_model(other, path)
        booster.load_optimizer(optimizer, path)
        assert_same(values(other), values(model))


def test_a_folder_with_files_of_its_own_beside_checkpoints_is_ambiguous(tmp_path: Path) -> None:
    booster, model, optimizer = boost(nn.Linear(4, 4))
    booster.save_model(model, tmp_path)
    booster.save_optimizer(optimizer, tmp_path)
    path = booster.save(tmp_path, model=model, optimizer=optimizer)
    for load, of, name in (
        (booster.load_model, model, "model.safetensors"),
        (booster.load_optimizer, optimizer, "optimizer.json"),
    ):
        with pytest.raises(CheckpointError) as error:
            load(of, tmp_path)
        assert f"give {tmp_path / name}, or the newest checkpoint, {path}" in str(error.value)
        load(of, tmp_path / name)
        load(of, path)


class Telling(nn.Linear):
    """Its extra state is no tensor."""

    said: Any = None

    def get_extra_state(self) -> Any:
        return {"said": self.said}

    def set_extra_state(self, state: Any) -> None:
        self.said = state["said"]


def test_extra_states_that_are_no_tensors_are_refused_with_the_layout_that_holds_them(tmp_path: Path) -> None:
    booster, model, optimizer = boost(Telling(4, 4))
    with pytest.raises(CheckpointError, match=r"_extra_state are not tensors.*layout='dcp' \(booster.save\)"):
        booster.save(tmp_path, model=model, optimizer=optimizer)
    model.said = "something"
    booster.save(tmp_path, model=model, optimizer=optimizer, layout="dcp")
    model.said = None
    booster.load(tmp_path, model=model, optimizer=optimizer)
    assert model.said == "something"
