"""The main job: what it shows, what it writes, how it ends."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemini.errors import CheckpointError
from gemini.telemetry.reader import read_run
from gemini.telemetry.run_status import RunStatus
from gemini.train import job
from gemini.train.checkpoints import OLD_STATE_FILE
from gemini.train.cli import main
from gemini.train.options import parse
from gemini.train.report import Report
from gemini.train.session import Session, _cosine, offload_folder

TINY = "--layers 2 --hidden 64 --heads 2 --seq-len 32 --batch-size 4 --sample-length 8 --lr 0.003".split()
STEPS = 8


def train(*arguments: object, on_step: Any = None) -> tuple[int, dict[str, Any]]:
    return job.run(parse([*TINY, "--steps", str(STEPS), *map(str, arguments)]), Report(sys.stderr), on_step)


def interrupt_after(step: int, times: int = 1) -> Any:
    def on_step(session: Session) -> None:
        if session.step == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return on_step


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All of the newest checkpoint; the files themselves say of which run they are."""
    files = (folder / "latest").glob("*.safetensors")
    return {f"{file.name}: {name}": value for file in files for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """One run from beginning to end, as a user starts it; what it said on stdout and on stderr."""
    folder = tmp_path_factory.mktemp("whole")
    environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    command = [sys.executable, "-W", "error", "-m", "gemini.train", *TINY, "--steps", str(STEPS), "--json"]
    done = subprocess.run(
        [*command, "--checkpoint", str(folder / "checkpoint")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not list((folder / "tmp").glob("gemini-memory-*"))  # the disk tier's temporary folder is gone
    return json.loads(done.stdout), done.stderr


def test_the_loss_falls(whole: tuple[dict[str, Any], str]) -> None:
    losses = whole[0]["losses"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5


def test_peaks_stay_within_capacities_that_the_model_data_exceed(whole: tuple[dict[str, Any], str]) -> None:
    content = whole[0]
    tiers = content["tiers"]
    assert content["model_data_bytes"] == content["parameters"] * 14
    assert content["model_data_bytes"] >= 2 * tiers["host"]["capacity_bytes"]
    assert tiers["disk"]["peak_bytes"] > 0
    for tier in tiers.values():
        assert tier["peak_bytes"] <= tier["capacity_bytes"]
        assert tier["source"]


def test_a_finished_run_is_there_for_gemini_stat(whole: tuple[dict[str, Any], str]) -> None:
    run = read_run(Path(whole[0]["run"]))
    assert run.status is RunStatus.FINISHED
    assert run.step == STEPS


def test_what_is_not_json_goes_to_stderr_plain(whole: tuple[dict[str, Any], str]) -> None:
    _, said = whole
    assert "\x1b" not in said and "\r" not in said
    assert re.search(r"step 8/8   loss \d\.\d{3}", said)
    assert "the model data are 2.0 times what host may hold" in said
    assert said.count("within capacity") == 2
    assert "FINISHED" in said
    assert "Warning" not in said and "Traceback" not in said


def test_transformers_loads_the_checkpoint_with_the_same_logits(whole: tuple[dict[str, Any], str]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = whole[0]["checkpoint"]
    theirs, found = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    options = parse(["--resume", folder])
    from gemini.train.model import GPT2LMHeadModel

    ours = GPT2LMHeadModel(options.model)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.arange(32).view(1, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(
    whole: tuple[dict[str, Any], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    code, content = train("--checkpoint", folder, on_step=interrupt_after(3))
    assert code == 130
    assert content["losses"] == whole[0]["losses"][:3]
    assert "interrupted after step 3 of 8" in capfd.readouterr().err
    # In another amount of memory: placement never changes numbers.
    code, content = job.run(parse(["--resume", str(folder), "--host-memory", "1GiB"]), Report(sys.stderr))
    assert code == 0
    assert content["losses"] == whole[0]["losses"]
    ours, theirs = tensors_of(folder), tensors_of(Path(whole[0]["checkpoint"]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # And what is finished has nothing more to do.
    code, content = job.run(parse(["--resume", str(folder)]), Report(sys.stderr))
    assert (code, content["step"]) == (0, STEPS)
    assert "--steps asks for more" in capfd.readouterr().err


def test_interrupted_twice_it_ends_at_once_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    train("--checkpoint", folder, "--steps", 2)
    before, handler = files_of(folder), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train("--checkpoint", folder, on_step=interrupt_after(4, times=2))
    assert files_of(folder) == before
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert signal.getsignal(signal.SIGINT) is handler  # whatever it was: jobs in the background ignore the signal


def test_a_job_that_is_killed_goes_on_from_the_last_of_the_checkpoints_that_it_wrote_on_its_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"

    def kill(session: Session) -> None:
        if session.step == 6:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train("--checkpoint", folder, "--save-every", 1, "--keep", 2, on_step=kill)
    kept = ["checkpoint-000004", "checkpoint-000005", "config.json", "latest", "model.safetensors"]
    assert sorted(os.listdir(folder)) == kept
    options = parse(["--resume", str(folder), "--steps", "6"])
    assert (options.checkpoint_folder, options.save_every, options.keep) == (folder, 1, 2)
    code, content = job.run(options, Report(sys.stderr))
    assert (code, content["step"], len(content["losses"])) == (0, 6, 6)
    older = parse(["--resume", str(folder / "checkpoint-000005"), "--steps", "5"])
    assert older.checkpoint_folder == folder
    with pytest.raises(SystemExit):
        parse(["--checkpoint", str(folder / "checkpoint-000005")])
    assert "is one checkpoint; give the folder of them" in capfd.readouterr().err
    assert job.run(older, Report(sys.stderr))[1]["step"] == 5


def test_another_learning_rate_is_taken_when_a_run_is_resumed(tmp_path: Path) -> None:
    train("--checkpoint", tmp_path, "--steps", 4, "--lr", 1e-3)
    rates = []
    options = parse(["--resume", str(tmp_path), "--steps", "6", "--lr", "2e-3"])
    job.run(options, Report(sys.stderr), on_step=lambda session: rates.append(session.schedule.get_last_lr()[0]))
    assert rates == [2e-3 * _cosine(6)(step) for step in (5, 6)]


def test_a_checkpoint_in_the_old_form_is_resumed_and_replaced(tmp_path: Path) -> None:
    code, content = train("--checkpoint", tmp_path / "new", "--steps", 2)
    new, old = tmp_path / "new" / "latest", tmp_path / "old"
    (old / "optimizer").mkdir(parents=True)
    for path in new.iterdir():
        if path.name.startswith("optimizer"):
            shutil.copy(path, old / "optimizer")
        elif path.name in ("model.safetensors", "config.json", "lr_scheduler.pt"):
            shutil.copy(path, old)
    state = {"version": 1, "step": 2, "losses": content["losses"], "options": content["config"]}
    state["torch_rng"] = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    (old / OLD_STATE_FILE).write_text(json.dumps(state))
    code, resumed = job.run(parse(["--resume", str(old), "--steps", "4"]), Report(sys.stderr))
    assert code == 0
    assert resumed["losses"][:2] == content["losses"]
    shown = {"config.json", "model.safetensors"}
    assert set(os.listdir(old)) == {"checkpoint-000001", "latest", *shown}
    assert all((old / name).is_symlink() for name in shown)
    assert parse(["--resume", str(old)]).steps == 4


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    train("--checkpoint", folder, "--steps", 1)
    before = files_of(folder)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemini.checkpoint.manifest.Manifest.text", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        train("--checkpoint", folder, "--steps", 1)
    assert files_of(folder) == before
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_precision_trains(precision: str, tmp_path: Path) -> None:
    code, content = train("--precision", precision, "--checkpoint", tmp_path / "checkpoint")
    assert code == 0
    assert content["losses"][-1] < content["losses"][0]


def test_an_emulated_device_has_a_capacity_of_its_own(tmp_path: Path) -> None:
    arguments = ["--device-memory", "600KiB", "--host-memory", "700KiB", "--checkpoint", tmp_path / "checkpoint"]
    code, content = train(*arguments)
    assert code == 0
    assert not content["device_and_host_are_one"]
    device = content["tiers"]["device"]
    assert device["source"] == "--device-memory"
    assert 0 < device["peak_bytes"] <= device["capacity_bytes"] == 600 << 10


def test_too_little_memory_is_one_message_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--host-memory", "20KB", "--disk-memory", "20KB", "--checkpoint", str(tmp_path / "none")]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "out of memory" in said and "Traceback" not in said
    assert "set --disk-memory to" in said and "host_memory" not in said
    assert not (tmp_path / "none").exists()
    assert main([*arguments, "--json"]) == 1
    failure = json.loads(capsys.readouterr().out)["error"]
    assert failure["code"] == 1 and "out of memory" in failure["message"]


def test_a_text_that_is_too_short_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("short")
    assert main([*TINY, "--text", str(tmp_path / "short.txt")]) == 2
    assert "short.txt has 5 bytes" in capsys.readouterr().err


def test_a_bug_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("gemini.train.cli.run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(TINY)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
OF_ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    "launcher", [pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.heavy), pytest.param((), id="its variables")]
)
def test_torchrun_with_one_process_works(launcher: tuple[str, ...], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, *launcher, "-m", "gemini.train", *TINY, "--steps", "2"]
    done = subprocess.run(
        [*command, "--checkpoint", str(tmp_path / "checkpoint")],
        env=dict(os.environ) if launcher else {**os.environ, **OF_ONE_RANK, "MASTER_PORT": port},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint" in done.stdout


def test_the_temporary_folder_goes_and_a_chosen_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with offload_folder(None) as folder:
        assert folder.parent == tmp_path
    assert not folder.exists()
    with offload_folder(tmp_path) as folder:
        assert folder == tmp_path
    assert tmp_path.exists()
