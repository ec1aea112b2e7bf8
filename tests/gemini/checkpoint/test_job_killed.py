"""``python -m gemini.train`` killed at any call of a save: ``--resume`` finds the last checkpoint or the new one."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from operations import Counted, Dead, Killed, intercepted
from safetensors.torch import load_file

from gemini.train.checkpoints import OLD_STATE_FILE
from gemini.train.options import parse, read_state
from gemini.train.session import Session, build
from gemini.train.text import Corpus

TINY = "--layers 1 --hidden 16 --heads 2 --seq-len 16 --batch-size 2 --steps 9 --host-memory 64MiB".split()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    yield build(parse(TINY), tmp_path_factory.mktemp("offload"))


def step(session: Session) -> None:
    session.train_step(*Corpus(bytes(range(256)) * 4, "a text").batch(0, session.step, 2, 16))


def begin(session: Session, folder: Path, form: str) -> Path:
    """A folder with checkpoints of the steps before, or one in the old form."""
    new = folder / "new"
    for _ in range(3):
        step(session)
        session.save(new)
    if form == "new":
        return new
    old, latest = folder / "old", new / "latest"
    (old / "optimizer").mkdir(parents=True)
    for path in latest.iterdir():
        shutil.copy(path, old / "optimizer" if path.name.startswith("optimizer") else old)
    for name in ("manifest.json", "extra.pt", "rng-00000.pt"):
        (old / name).unlink()
    state = {"version": 1, "step": session.step, "losses": session.losses, "options": session.options.as_json()}
    state["torch_rng"] = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    (old / OLD_STATE_FILE).write_text(json.dumps(state))
    return old


def resumed(folder: Path, offload: Path) -> int:
    """The step that a job goes on from, whose model transformers would read."""
    session = build(parse(["--resume", str(folder), "--host-memory", "64MiB"]), offload)
    shown = load_file(folder / "model.safetensors")
    weights = {name: value for name, value in session.model.state_dict().items() if name in shown}
    # A kill between the rename that commits and the one of `latest` leaves the model of the step before to be read.
    assert shown.keys() == weights.keys()
    return session.step


@pytest.mark.parametrize("form", ["new", "old"])
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.heavy)])
def test_a_job_that_is_killed_at_any_call_is_resumed(session: Session, tmp_path: Path, form: str, every: int) -> None:
    base, work = begin(session, tmp_path, form), tmp_path / "work"
    old = session.step
    step(session)
    shutil.copytree(base, work / "checkpoints", symlinks=True)
    counted = Counted()
    with intercepted(work, counted):
        session.save(work / "checkpoints")
    found = []
    for n in range(0, len(counted.calls), every):
        shutil.rmtree(work)
        shutil.copytree(base, work / "checkpoints", symlinks=True)
        with pytest.raises(Dead), intercepted(work, Killed(n)):
            session.save(work / "checkpoints")
        found.append(int(read_state(work / "checkpoints")["step"]))
        if n % 4 == 0:
            assert resumed(work / "checkpoints", tmp_path / "offload") == found[-1]
        session.save(work / "checkpoints")
        assert read_state(work / "checkpoints")["step"] == session.step
        names = {path.name for path in (work / "checkpoints").iterdir()}
        assert not {name for name in names if name.startswith(".")}, (n, counted.calls[n])
        assert OLD_STATE_FILE not in names and "optimizer" not in names, (n, counted.calls[n])
    assert set(found) == {old, session.step}
    assert found == sorted(found)
