"""Whatever happens while a checkpoint is overwritten, the old one or the new one can be loaded."""

import errno
import json
import os
import resource
import signal
import stat

import pytest
import torch
from checkpoint_cases import assert_same, boost, child, gpt2, mixed, train, values

from gemini.checkpoint import load_model, load_optimizer, save_model, save_optimizer
from gemini.checkpoint.stage import Stage
from gemini.errors import CheckpointError


def test_a_process_killed_while_it_overwrites_leaves_a_whole_checkpoint(tmp_path) -> None:
    done = child("child_killed.py", tmp_path)
    results = json.loads(done.stdout.splitlines()[-1])
    for form, (at_random, at_each_change) in results.items():
        assert sum(at_random.values()) == 8, form
        assert at_each_change["old"] > 0 and at_each_change["new"] > 0, (form, at_each_change)


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


@pytest.mark.parametrize("options", [{}, {"shard": True, "size_per_shard": "10KiB"}])
def test_a_folder_that_cannot_be_forced_to_the_disk_costs_nothing(tmp_path, monkeypatch, options) -> None:
    """At every sync of a folder: the old or the new one loads, and the message says which is there."""
    booster, model, optimizer = boost(gpt2())
    real, left = os.fsync, [0]

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    save_model(model, tmp_path, **options)
    there, messages = values(model), []
    for failing in range(1, 100):
        train(booster, model, optimizer, range(1))
        left[0], message = failing, "saved"
        try:
            save_model(model, tmp_path, **options)
        except CheckpointError as error:
            message = str(error)
        if left[0] > 0:
            break
        _, other, _ = boost(gpt2(seed=1))
        load_model(other, tmp_path)
        there = there if "is as it was" in message else values(model)
        assert_same(other.state_dict(), there)
        messages.append(message)
    else:
        raise AssertionError("a save without end")
    assert any("holds the new checkpoint" in message for message in messages)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
