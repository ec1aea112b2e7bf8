"""Budgets that change while a model is trained: by its user, and by somebody outside of its process."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from collected import collect_all
from loop import SMALL, Trained, check_same

from gemini.boosted import boosted
from gemini.boosting import seating
from gemini.chunk import Tier
from gemini.errors import OutOfMemory
from gemini.lease import part
from gemini.lease.budget import Budget
from gemini.lease.folder import LeaseFolder
from gemini.process_wide import PerProcess
from gemini.stat.cli import main
from gemini.stat.console import Exit

KIB = 1 << 10
ROOMY: dict[str, Any] = {"host_memory": "4MiB", "offload_dir": "disk", **SMALL}


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect_all()  # models of other tests, which share the process's budget
    monkeypatch.setattr(seating, "_budget_of_process", PerProcess(Budget))  # theirs may have its lease elsewhere
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(part, "LOOK_SECONDS", 0.0)


def step(each: Trained, number: int) -> float:
    torch.manual_seed(number)  # for the dropout
    return each.step(number)


def bytes_on(ours: Trained, tier: Tier) -> int:
    chunks = boosted(ours.model).manager.chunks
    return sum(home.nbytes for chunk in chunks for home in chunk.homes.values() if home.tier is tier)


def capacity(ours: Trained, tier: Tier = Tier.HOST) -> int:
    return boosted(ours.model).manager.ledger.capacity(tier)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_half_of_the_memory_in_the_middle_of_training_changes_no_bit(precision: str) -> None:
    halved, whole = Trained(ROOMY, precision), Trained(ROOMY, precision)
    for number in range(6):
        if number == 2:
            used = boosted(halved.model).manager.ledger.used(Tier.HOST)
            halved.booster.resize(halved.model, host_memory=used // 2)
            assert bytes_on(halved, Tier.DISK) > 0
        if number == 4:
            halved.booster.resize(halved.model, host_memory="4MiB")
            assert bytes_on(halved, Tier.DISK) == 0
        assert step(halved, number) == step(whole, number)
    check_same(halved, whole)


def test_what_cannot_be_done_is_refused_and_changes_nothing() -> None:
    ours, plain = Trained(ROOMY), Trained(ROOMY)
    with pytest.raises(ValueError, match="needs host_memory, device_memory or disk_memory"):
        ours.booster.resize(ours.model)
    with pytest.raises(ValueError, match=r"host_memory must be .* more than 0, got 0"):
        ours.booster.resize(ours.model, host_memory=0)
    with pytest.raises(TypeError, match=r"host_memory must be .*got 1\.5 of type float"):
        ours.booster.resize(ours.model, host_memory=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no device tier of its own"):
        ours.booster.resize(ours.model, device_memory="1MiB")
    with pytest.raises(OutOfMemory, match="or more"):
        ours.booster.resize(ours.model, host_memory="1KiB")
    with pytest.raises(TypeError, match=r"that booster\.boost returned"):
        ours.booster.resize(torch.nn.Linear(2, 2), host_memory="1MiB")
    assert capacity(ours) == 4 << 20
    for number in range(2):
        assert step(ours, number) == step(plain, number)


def test_within_a_forward_and_a_backward_it_is_refused() -> None:
    ours = Trained(ROOMY)
    said: list[str] = []

    def ask(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="while a forward or backward runs") as caught:
            ours.booster.resize(ours.model, host_memory="3MiB")
        said.append(str(caught.value))

    hooks = [ours.model[0].register_forward_hook(ask), next(ours.model.parameters()).register_hook(ask)]
    step(ours, 0)
    for hook in hooks:
        hook.remove()  # the garbage collector does not see through a parameter's
    assert len(said) == 2


def test_a_device_that_is_emulated_is_resized_by_its_own_argument() -> None:
    placement = {"device_memory": "100KiB", **ROOMY}
    ours, plain = Trained(placement), Trained(placement)
    for number in range(4):
        if number == 1:
            ours.booster.resize(ours.model, device_memory="60KiB")
            assert capacity(ours, Tier.DEVICE) == 60 * KIB
        assert step(ours, number) == step(plain, number)


def ask(*arguments: str) -> threading.Thread:
    """``gemini-stat lease`` in another thread, as from another terminal."""
    thread = threading.Thread(target=lambda: found.append(main(["lease", *arguments, "--timeout", "20"])))
    found: list[int] = []
    thread.found = found  # type: ignore[attr-defined]
    thread.start()
    return thread


def wait_until_asked() -> None:
    folder = LeaseFolder().path
    end = threading.Event()
    for _ in range(2000):
        if any(name.suffix == ".ask" for name in folder.iterdir()):
            return
        end.wait(0.005)
    raise AssertionError("nothing was asked")


def test_a_run_follows_what_gemini_stat_asks_at_its_next_forward(capsys: pytest.CaptureFixture[str]) -> None:
    ours, plain = Trained({"offload_dir": "disk", **SMALL}), Trained(None)
    step(ours, 0), step(plain, 0)
    used = boosted(ours.model).manager.ledger.used(Tier.HOST)
    (name,) = LeaseFolder().standings()
    asking = ask(name, "--host", str(used // 2))
    wait_until_asked()
    losses = [step(ours, number) for number in range(1, 4)]
    asking.join(20)
    assert asking.found == [Exit.OK]  # type: ignore[attr-defined]
    assert capacity(ours) == used // 2
    assert bytes_on(ours, Tier.DISK) > 0
    assert losses == [step(plain, number) for number in range(1, 4)]
    check_same(ours, plain)


def test_a_run_that_cannot_answers_with_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    ours = Trained({"offload_dir": "disk", **SMALL})
    step(ours, 0)
    before = capacity(ours)
    (name,) = LeaseFolder().standings()
    asking = ask(name, "--host", "1KiB", "--json")
    wait_until_asked()
    step(ours, 1)
    asking.join(20)
    assert asking.found == [Exit.NEGATIVE]  # type: ignore[attr-defined]
    answer = json.loads(capsys.readouterr().out)
    assert "host tier out of memory" in answer["text"]
    assert capacity(ours) == before
    step(ours, 2)


def test_a_lease_goes_with_the_last_model_of_its_process() -> None:
    ours = Trained({"offload_dir": "disk", **SMALL})
    assert len(LeaseFolder().standings()) == 1
    del ours.model, ours.optimizer, ours.booster
    collect_all()
    assert LeaseFolder().standings() == {}


def test_a_model_that_was_not_boosted_holds_nothing() -> None:
    with pytest.raises(OutOfMemory):
        Trained({"host_memory": "1KiB"})
    assert LeaseFolder().standings() == {}
