"""Full disks, folders that cannot be made, and other processes; see ``test_faults.py`` for faults at every call."""

import resource
import signal

import pytest
import torch
from checkpoint_cases import assert_same, boost, gpt2, mixed, values

from gemini.checkpoint import load_model, load_optimizer, save_model, save_optimizer
from gemini.checkpoint.stage import Stage
from gemini.errors import CheckpointError


@pytest.fixture
def small_files():
    """No file may be larger than 64 KiB: as on a full disk, writing fails with an error of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


FORMS = ["folder", "m.safetensors", "m.pt", "sharded"]


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_a_clear_error_and_the_old_checkpoint_stays(tmp_path, form: str, request) -> None:
    options = {"shard": True, "size_per_shard": "100KiB"} if form == "sharded" else {}
    target = tmp_path / form
    save_model(gpt2(seed=0), target, **options)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError, match=r"could not be written \(after \d+.* bytes\): File too large") as caught:
        save_model(gpt2(seed=1), target, **options)
    assert str(target) in str(caught.value)
    if form != "m.pt":  # how long that will be is not known before
        assert "the file needs" in str(caught.value)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    model = gpt2(seed=2)
    load_model(model, target)
    assert_same(model.state_dict(), values(gpt2(seed=0)))


@pytest.mark.parametrize("form", ["folder", "optimizer.pt"])
def test_a_full_disk_leaves_the_old_optimizer(tmp_path, form: str, request) -> None:
    _, model, optimizer = boost(gpt2())
    save_optimizer(optimizer, tmp_path / form)
    for parameter in model.parameters():
        zeros = parameter.detach() * 0
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": zeros, "exp_avg_sq": zeros}
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError, match="File too large"):
        save_optimizer(optimizer, tmp_path / form)
    load_optimizer(optimizer, tmp_path / form)
    assert optimizer.state_dict()["state"] == {}


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/x cannot be written to: Not a directory"):
        save_model(mixed(), tmp_path / "file" / "x")


def test_an_error_of_the_model_leaves_nothing(tmp_path, monkeypatch) -> None:
    def broken(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemini.checkpoint.safetensors_stream.SafetensorsWriter.write", broken)
    with pytest.raises(KeyboardInterrupt):
        save_model(mixed(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_another_process_that_is_saving_are_left_alone(tmp_path) -> None:
    with Stage(tmp_path, "model") as other:
        save_model(mixed(), tmp_path)
        assert other.path.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
