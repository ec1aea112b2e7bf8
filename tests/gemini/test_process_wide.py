"""malloc returns freed memory while non-model data are measured and RAM is short; oneDNN keeps few kernels."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from loop import SMALL, batch, build

from gemini import process_wide, signals
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.engine import sampling
from gemini.nn.optimizer import HybridAdam

CHILD = Path(__file__).with_name("child_process_wide.py")
MIB = 1 << 20


def child(*arguments: str, **variables: str) -> dict[str, int]:
    """What the child says, in MiB, without what the user or an earlier `boost` has put into the environment."""
    unwanted = (*process_wide._USERS_CHOICES, *process_wide._KERNELS_VARIABLES)
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


def test_malloc_returns_and_keeps_freed_memory_as_asked() -> None:
    """Every second block of 256 MiB of them is freed."""
    took = child("blocks")
    assert took["kept"] > 220  # the guard: without it glibc keeps nearly all
    assert took["returned"] < 150
    assert took["trimmed"] < 150 and took["returned_later"] < 150  # what was kept goes, too


def test_what_the_user_says_about_malloc_stays() -> None:
    took = child("blocks", MALLOC_MMAP_THRESHOLD_=str(32 << 20))
    assert took["returned"] > 220


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.heavy
def test_ever_new_shapes_do_not_fill_the_memory() -> None:
    took, bounded = child("shapes"), child("shapes", "bound")
    print(f"\n600 shapes: {took['grown']} MiB, bounded {bounded['grown']} MiB")
    assert bounded["grown"] < 0.7 * took["grown"]


def test_malloc_may_keep_memory_where_there_is_room_for_more_than_is_needed() -> None:
    assert process_wide.can_keep_freed_memory(free_bytes=250, growth_bytes=0, non_model_bytes=100)
    assert not process_wide.can_keep_freed_memory(free_bytes=250, growth_bytes=1, non_model_bytes=100)


@pytest.mark.parametrize("free_bytes", [1 << 40, 0], ids=["room", "no room"])
def test_training_returns_memory_while_it_measures_and_keeps_it_with_room(
    free_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sampling, "return_freed_memory", lambda: said.append("return"))
    monkeypatch.setattr(sampling, "keep_freed_memory", lambda: said.append("keep"))
    monkeypatch.setattr(sampling, "host_headroom", lambda: (free_bytes, "a limit"))
    model = build()
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **SMALL))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))

    def step(rows: int) -> None:
        booster.backward(model(batch(0, rows)).float().square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    then = ["keep"] if free_bytes else []
    step(8)
    assert said == ["return"]
    step(8)
    step(8)
    assert said == ["return", *then]
    step(64)  # heavier than any before: measured
    step(8)
    assert said == ["return", *then] * 2


@pytest.mark.parametrize("plain_backward", [False, True], ids=["booster", "loss.backward"])
def test_large_holes_are_given_back_before_backward_where_memory_is_kept(
    plain_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sampling, "trim_large_holes", lambda: said.append("trim"))
    monkeypatch.setattr(sampling, "host_headroom", lambda: (1 << 40, "a limit"))
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **SMALL))
    model = build()
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    trims = []
    for _ in range(3):
        loss = model(batch(0, 8)).float().square().mean()
        assert not said
        loss.backward() if plain_backward else booster.backward(loss, optimizer)
        trims.append(bool(said))
        said.clear()
        optimizer.step()
        optimizer.zero_grad()
    assert trims == [False, True, True]  # the first is measured, and nothing kept


def test_signals_come_to_a_handler_only_within_the_context() -> None:
    before, came = signal.getsignal(signal.SIGINT), []
    with signals.signals_to(lambda number, frame: came.append(number)):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGINT, signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_stay_with_the_program_on_other_threads() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with signals.signals_to(lambda number, frame: None):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(30)
    assert found == [before]


def test_a_thread_that_computes_alone_leaves_the_number_of_others() -> None:
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)

    def compute() -> None:
        process_wide.compute_on_this_thread(torch.get_num_threads, torch.set_num_threads)
        found.append(torch.get_num_threads())

    for target in (compute, lambda: found.append(torch.get_num_threads())):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join(30)
    assert found == [1, 2]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_small_stacks_are_undone() -> None:
    before = threading.stack_size()
    with process_wide.small_stacks():
        assert threading.stack_size() == process_wide.IO_STACK_BYTES
    assert threading.stack_size() == before
    with process_wide.small_stacks(0):
        assert threading.stack_size() == before


def test_contexts_of_small_stacks_on_several_threads_leave_the_size_as_it_was() -> None:
    before, entered, left = threading.stack_size(), threading.Event(), threading.Event()

    def other() -> None:
        entered.set()
        with process_wide.small_stacks():
            pass
        left.set()

    with process_wide.small_stacks():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        assert not left.wait(0.05)  # it waits for this context to end
    thread.join(10)
    assert left.is_set()
    assert threading.stack_size() == before
