"""Without a policy everything is kept until memory runs out; from then on it is "auto", with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import SMALL, Trained, check_same
from torch import nn

import gemini
from gemini.activations import ActivationCounts, KeepAll
from gemini.activations.until_short import KeepUntilShort
from gemini.boosted import boosted
from gemini.errors import OffloadError, OutOfMemory
from gemini.memory.foresight import lacking_for_backward
from gemini.torch_private import saving_hooks

pytestmark = pytest.mark.usefixtures("one_thread")

CHILD = Path(__file__).parent / "child_until_short.py"
SHORT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
PLACEMENTS: dict[str, dict[str, Any]] = {"RAM": {}, "a device of its own": {"device_memory": "80KiB"}}
LIMIT_MIB = 100


def trained(limit_mib: int, folder: Path, *policy: str) -> Any:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(CHILD), str(limit_mib), str(folder), *policy],
        capture_output=True, text=True, timeout=400, env=clean,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.heavy  # below the failures are made, and test_small_limits.py has a real limit
def test_a_sequence_that_does_not_fit_is_trained_with_nothing_but_a_folder(tmp_path: Path) -> None:
    losses, switched = trained(0, tmp_path)
    assert not switched
    assert trained(LIMIT_MIB, tmp_path) == [losses, 1]


@pytest.mark.heavy
def test_who_says_keep_is_told_that_it_does_not_fit(tmp_path: Path) -> None:
    assert trained(LIMIT_MIB, tmp_path, "keep") == "OutOfMemory"


def no_memory(*_: Any) -> None:
    raise MemoryError


class Fails:
    """Raises in the forward or backward of one module, for as long as everything is kept."""

    def __init__(self, run: Trained, where: str) -> None:
        self.model, self.where, self.failed = run.model, where, 0
        self.handle = list(run.model.children())[-1].register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.model.memory_stats()["activation/switch_count"]:
            return
        if self.where == "forward":
            self.fail()
        output.register_hook(self.fail)

    def fail(self, *_: Any) -> None:
        self.failed += 1
        raise RuntimeError(SHORT)


def check_steps(ours: Trained, plain: Trained) -> None:
    for number in range(3):
        losses = []
        for run in (ours, plain):
            torch.manual_seed(number)
            losses.append(run.step(number))
        assert losses[0] == losses[1]


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_forward_that_failed_runs_again_and_keeps_less(placement: dict[str, Any], tmp_path: Path) -> None:
    ours, plain = Trained({"offload_dir": tmp_path, **placement, **SMALL}), Trained(None)
    fails = Fails(ours, "forward")
    check_steps(ours, plain)
    assert fails.failed
    assert ours.model.memory_stats()["activation/switch_count"] == 1
    check_same(ours, plain)


def test_what_a_forward_was_given_is_not_taken_back_by_what_idle_models_can_lend(tmp_path: Path) -> None:
    shared = {"budget": gemini.Budget(), "offload_dir": tmp_path, **SMALL}
    other = Trained(shared)
    other.step(0)
    ours, plain = Trained(shared), Trained(None)
    fails = Fails(ours, "forward")
    check_steps(ours, plain)
    assert 0 < fails.failed < 4
    assert ours.model.memory_stats()["activation/switch_count"] == 1
    check_same(ours, plain)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_after_a_backward_that_failed_the_next_forward_keeps_less(placement: dict[str, Any], tmp_path: Path) -> None:
    ours, plain = Trained({"offload_dir": tmp_path, **placement, **SMALL}), Trained(None)
    fails = Fails(ours, "backward")
    loss = ours.loss(0)
    with pytest.raises(OutOfMemory, match="next forward keeps less"):
        ours.backward(loss)
    for number in range(3):
        for run in (ours, plain):
            torch.manual_seed(number)
            run.step(number)
    assert fails.failed == 1
    assert ours.model.memory_stats()["activation/switch_count"] == 1
    check_same(ours, plain)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_who_says_keep_keeps(where: str, tmp_path: Path) -> None:
    ours = Trained({"offload_dir": tmp_path, "activation_policy": "keep", **SMALL})
    Fails(ours, where)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            ours.backward(ours.loss(0))
    assert ours.model.memory_stats()["activation/switch_count"] == 0


def test_an_evaluation_that_failed_changes_nothing(tmp_path: Path) -> None:
    ours = Trained({"offload_dir": tmp_path, **SMALL})
    handle = list(ours.model.children())[-1].register_forward_hook(no_memory)
    with torch.no_grad(), pytest.raises(OutOfMemory):
        ours.loss(0)
    handle.remove()
    ours.step(0)
    assert ours.model.memory_stats()["activation/switch_count"] == 0


def test_a_model_that_can_keep_no_less_never_changes() -> None:
    ours = Trained(SMALL)  # has no blocks, and there is no tier below
    Fails(ours, "backward")
    for _ in range(2):
        with pytest.raises(OutOfMemory) as raised:
            ours.backward(ours.loss(0))
        assert "next forward keeps less" not in str(raised.value)
    assert isinstance(boosted(ours.model).saving, KeepAll)


def test_while_everything_fits_no_hook_is_there(tmp_path: Path) -> None:
    ours = Trained({"offload_dir": tmp_path, **SMALL})
    seen = []
    next(iter(ours.model.children())).register_forward_hook(lambda *_: seen.append(saving_hooks()))
    ours.step(0)
    assert seen == [None]
    assert isinstance(boosted(ours.model).saving, KeepUntilShort)


def test_it_changes_once_and_only_where_nothing_else_helps() -> None:
    made = []

    def make(counts: ActivationCounts) -> KeepAll:
        made.append(counts)
        return KeepAll()

    saving = KeepUntilShort(make)
    assert not saving.ran_short(others_help=True)
    with saving.of_call():
        assert not made
    assert saving.ran_short(others_help=False) and saving.ran_short(others_help=True)
    assert not saving.keeps_until_short
    for _ in range(2):
        with saving.of_call():
            assert made == [saving.counts]
    assert saving.counts.switch_count == 1
    assert not saving.ran_short(others_help=False)


def test_where_there_is_no_place_everything_is_kept_as_before(caplog: pytest.LogCaptureFixture) -> None:
    def make(counts: ActivationCounts) -> KeepAll:
        raise OffloadError("the disk is full")

    saving = KeepUntilShort(make)
    assert saving.ran_short(others_help=False)
    with saving.of_call():
        assert "the disk is full" in caplog.text
    assert not saving.ran_short(others_help=False)
    assert saving.counts.switch_count == 0


def test_what_a_backward_lacks_grows_with_what_is_saved_and_with_the_output() -> None:
    assert lacking_for_backward(100 << 20, 0, 200 << 20, 0) == 0
    some = lacking_for_backward(1 << 30, 0, 100 << 20, 0)
    assert 0 < some < lacking_for_backward(1 << 30, 1 << 20, 100 << 20, 0)
    assert lacking_for_backward(1 << 30, 0, 100 << 20, 1 << 20) == some + (1 << 20)
