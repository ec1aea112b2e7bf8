"""malloc is exact while non-model data are measured and while RAM is short; oneDNN keeps few kernels."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from loop import SMALL, batch, build

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import workers
from gemini.chunk.disk_tuning import DEPTHS
from gemini.engine import sampling
from gemini.memory import native_memory
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.kernel_pool import default_pool
from gemini.stacks import IO_STACK_BYTES, default_stack_bytes

CHILD = Path(__file__).with_name("child_native_memory.py")
MIB = 1 << 20


def child(*arguments: str, **variables: str) -> dict[str, int]:
    """What the child says, in MiB, without what the user or an earlier `boost` has put into the environment."""
    unwanted = (*native_memory._USERS_CHOICES, *native_memory._KERNELS_VARIABLES)
    clean = {name: value for name, value in os.environ.items() if name not in unwanted}
    done = subprocess.run(
        [sys.executable, str(CHILD), *arguments],
        env={**clean, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: int(nbytes) // MIB for name, nbytes in (line.split() for line in done.stdout.splitlines())}


def test_exact_gives_back_what_quick_keeps() -> None:
    """Every second block of 256 MiB of them is freed."""
    took = child("blocks")
    assert took["quick"] > 220  # the guard: without it glibc keeps nearly all
    assert took["exact"] < 150
    assert took["exact_later"] < 150  # what quick has kept goes when exact begins


def test_what_the_user_says_about_malloc_stays() -> None:
    took = child("blocks", MALLOC_MMAP_THRESHOLD_=str(32 << 20))
    assert took["exact"] > 220


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.heavy
def test_ever_new_shapes_do_not_fill_the_memory() -> None:
    took, bounded = child("shapes"), child("shapes", "bound")
    print(f"\n600 shapes: {took['grown']} MiB, bounded {bounded['grown']} MiB")
    assert bounded["grown"] < 0.7 * took["grown"]


def test_there_is_room_where_malloc_may_keep_more_than_is_needed() -> None:
    assert native_memory.has_room_to_be_quick(free_bytes=250, growth_bytes=0, non_model_bytes=100)
    assert not native_memory.has_room_to_be_quick(free_bytes=250, growth_bytes=1, non_model_bytes=100)


@pytest.mark.parametrize("free_bytes", [1 << 40, 0], ids=["room", "no room"])
def test_training_measures_exactly_and_is_quick_where_there_is_room(
    free_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sampling, "be_exact", lambda: said.append("exact"))
    monkeypatch.setattr(sampling, "be_quick", lambda: said.append("quick"))
    monkeypatch.setattr(sampling, "host_headroom", lambda: (free_bytes, "a limit"))
    model = build()
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **SMALL))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))

    def step(rows: int) -> None:
        booster.backward(model(batch(0, rows)).float().square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    then = ["quick"] if free_bytes else []
    step(8)
    assert said == ["exact"]
    step(8)
    step(8)
    assert said == ["exact", *then]
    step(64)  # heavier than any before: measured
    step(8)
    assert said == ["exact", *then] * 2


@pytest.mark.parametrize("uses_disk", [False, True])
def test_the_stacks_of_all_threads_of_a_training_are_counted(
    uses_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[int] = []
    start = threading.Thread.start

    def counted(thread: threading.Thread) -> None:
        stacks.append(threading.stack_size(0) or default_stack_bytes())  # which also sets it
        threading.stack_size(0 if stacks[-1] == default_stack_bytes() else stacks[-1])
        start(thread)

    default_pool()  # of the process, like those of libraries
    monkeypatch.setattr(threading.Thread, "start", counted)
    monkeypatch.setattr(workers, "_undertaker", workers._Undertaker())  # as in a new process
    limits = {"host_memory": "300KiB", "offload_dir": tmp_path / "disk", **SMALL} if uses_disk else {}
    model = build()
    booster = Booster(plugin=GeminiPlugin(telemetry=tmp_path / "run", **limits))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    for number in range(2):
        booster.backward(model(batch(number)).float().square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    counted_bytes = native_memory.stack_bytes(uses_disk)
    beside = (max(DEPTHS) - 1) * IO_STACK_BYTES if uses_disk else 0  # so small a tier has one request at a time
    assert sum(stacks) == counted_bytes - beside
