"""Out of memory in the model's own computation and in ours: said clearly, survived, and learned from."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import SMALL, WIDTH, Trained, batch, check_same
from parity import check_at_rest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemini.boosted import boosted
from gemini.chunk import Tier
from gemini.errors import OutOfMemory, is_out_of_memory

pytestmark = pytest.mark.usefixtures("one_thread")

STREAMED = {"device_memory": "48KiB", **SMALL}
SHAPES: dict[str, Callable[[], BaseException]] = {  # anew each time: one that was raised keeps what its frames hold
    "torch on CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "torch on CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1234567 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "C++": lambda: RuntimeError("std::bad_alloc"),
    "oneDNN": lambda: RuntimeError("could not create a primitive"),
    "Python": MemoryError,
}
FEW = ("torch on CPU", "Python")


class Fails(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[], BaseException]) -> Tensor:
        ctx.make = make  # an error that was raised would be held by the graph that its frames hold
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ctx.make()


def failing(make: Callable[[], BaseException], where: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if where == "forward":
            raise make()
        return Fails.apply(output, make)  # type: ignore[no-any-return]

    return hook


def trained(placement: dict[str, Any]) -> tuple[Trained, Trained]:
    """Both after two steps."""
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
        run.step(1)
    return ours, plain


def go_on(*runs: Trained) -> None:
    for run in runs:
        torch.manual_seed(9)
        run.step(3)
        run.step(4)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("shape", "where"),
    [
        pytest.param(name, where, id=f"{name}-{where}", marks=() if is_quick else pytest.mark.heavy)
        for name in SHAPES
        for where, is_quick in (("backward", True), ("forward", name in FEW))  # it is tried again and again
    ],
)
def test_whatever_form_it_has_it_becomes_ours_and_training_goes_on(
    shape: str, where: str, placement: dict[str, Any]
) -> None:
    ours, plain = trained(placement)
    handle = ours.model[6].register_forward_hook(failing(SHAPES[shape], where))
    with pytest.raises(OutOfMemory, match=r"out of memory.*own computation.*_memory") as caught:
        ours.backward(ours.loss(2))
    cause, expected = caught.value.__cause__, SHAPES[shape]()
    assert type(cause) is type(expected) and str(cause) == str(expected)
    assert isinstance(caught.value, torch.OutOfMemoryError) and len(caught.value.args) == 1
    handle.remove()
    go_on(ours, plain)
    check_same(ours, plain)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("next_call", ["step", "forward", "evaluation"])
def test_a_failed_backward_called_by_the_user_leaves_no_gradients(next_call: str, placement: dict[str, Any]) -> None:
    ours, plain = trained(placement)
    handle = ours.model[6].register_forward_hook(failing(SHAPES["torch on CPU"], "backward"))
    with pytest.raises(RuntimeError, match="can't allocate"):
        ours.loss(2).backward()
    handle.remove()
    if next_call == "step":
        ours.optimizer.step()  # the gradients that came before the failure are half of a step
    elif next_call == "evaluation":
        with torch.no_grad():
            ours.model(batch(5))
    go_on(ours, plain)
    check_same(ours, plain)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_running_out_within_a_recomputation_is_survived(use_reentrant: bool, placement: dict[str, Any]) -> None:
    ours, plain = trained(placement)

    def loss(run: Trained, step: int) -> Tensor:
        x = batch(step).requires_grad_(True)
        return checkpoint(run.model, x, use_reentrant=use_reentrant).square().mean()  # type: ignore[no-any-return]

    calls = []

    def second_time(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise SHAPES["torch on CPU"]()

    handle = ours.model[6].register_forward_hook(second_time)
    value = loss(ours, 2)
    with pytest.raises(OutOfMemory, match="own computation"):
        ours.backward(value)
    handle.remove()
    for run in (ours, plain):
        torch.manual_seed(9)
        run.backward(loss(run, 3))
        run.optimizer.step()
        run.optimizer.zero_grad()
    go_on(ours, plain)
    check_same(ours, plain)


def test_running_out_in_evaluation_leaves_a_step_under_way_alone(placement: dict[str, Any]) -> None:
    ours, plain = trained(placement)
    results = []
    for run in (ours, plain):
        torch.manual_seed(9)
        loss = run.loss(2)
        if run is ours:
            handle = ours.model[9].register_forward_hook(failing(SHAPES["torch on CPU"], "forward"))
            with torch.no_grad(), pytest.raises(OutOfMemory):
                ours.model(batch(5))
            handle.remove()
        torch.manual_seed(10)
        run.backward(loss)
        run.optimizer.step()
        run.optimizer.zero_grad()
        results.append(loss.item())
    assert results[0] == results[1]
    go_on(ours, plain)
    check_same(ours, plain)


def test_a_failed_forward_keeps_what_earlier_micro_batches_have_added(placement: dict[str, Any]) -> None:
    ours, plain = trained(placement)
    for run in (ours, plain):
        torch.manual_seed(9)
        run.backward(run.loss(2))
        if run is ours:
            state = torch.get_rng_state()
            handle = ours.model[6].register_forward_hook(failing(SHAPES["Python"], "forward"))
            with pytest.raises(OutOfMemory):
                ours.loss(50)
            handle.remove()
            torch.set_rng_state(state)
        run.backward(run.loss(3))
        run.optimizer.step()
        run.optimizer.zero_grad()
    go_on(ours, plain)
    check_same(ours, plain)


def test_fewer_full_copies_are_kept_afterwards_but_never_too_few() -> None:
    ours, plain = trained({"device_memory": "80KiB", "activation_policy": "keep", **SMALL})
    room = boosted(ours.model).engine.room
    rooms = [room.full_capacity_bytes]
    for attempt in range(6):
        handle = ours.model[6].register_forward_hook(failing(SHAPES["torch on CPU"], "forward"))
        with pytest.raises(OutOfMemory) as caught:
            ours.loss(20 + attempt)
        handle.remove()
        assert not any(c.is_resident for c in boosted(ours.model).manager.chunks if c.full_nbytes)
        rooms.append(room.full_capacity_bytes)
        go_on(ours, plain)
        assert sum(c.full_nbytes for c in boosted(ours.model).manager.chunks if c.is_resident) <= rooms[-1]
    assert rooms[1] < rooms[0] and sorted(rooms, reverse=True) == rooms
    assert rooms[-1] == rooms[-2] > 0  # what one unit needs
    assert "No full copies are left to give up" in str(caught.value)
    check_same(ours, plain)


def test_a_unit_larger_than_what_was_left_gets_its_room_back() -> None:
    ours, plain = Trained({"device_memory": "80KiB", **SMALL}), Trained(None)
    for _ in range(3):  # in the very first forward: nothing is known of later units
        handle = ours.model[0].register_forward_hook(failing(SHAPES["torch on CPU"], "forward"))
        with pytest.raises(OutOfMemory):
            ours.loss(0)
        handle.remove()
    assert boosted(ours.model).engine.room.given_up_bytes > 0
    go_on(ours, plain)
    check_same(ours, plain)


class Refuses:
    """An allocator that has less than the ledger thinks: the first ``times`` calls of ``grow`` fail."""

    def __init__(self, run: Trained, times: int) -> None:
        self.device = boosted(run.model).manager.device
        self.grow, self.times, self.failed = self.device.grow, times, 0

    def __enter__(self) -> "Refuses":
        def grow(full: Tensor) -> None:
            if self.failed < self.times:
                self.failed += 1
                raise SHAPES["torch on CPU"]()
            self.grow(full)

        self.device.grow = grow  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc: object) -> None:
        del self.device.grow


def test_a_refused_fetch_is_tried_once_more_in_the_room_of_idle_chunks() -> None:
    ours, plain = trained({"device_memory": "80KiB", "max_prefetch": 0, **SMALL})
    with Refuses(ours, 1) as refused:
        for run in (ours, plain):
            torch.manual_seed(8)
            run.step(2)
    assert refused.failed == 1
    go_on(ours, plain)
    check_same(ours, plain)


def test_a_fetch_that_is_refused_twice_says_who_holds_what() -> None:
    ours, plain = trained({"device_memory": "80KiB", "max_prefetch": 0, **SMALL})
    with Refuses(ours, 1000), pytest.raises(OutOfMemory) as caught:
        ours.loss(2)
    message = str(caught.value)
    for part in ("device tier out of memory", "Chunk ", ".weight", "are free", "can't allocate memory", "(for "):
        assert part in message, message
    assert "set device_memory to " in message
    check_at_rest(ours.model)
    go_on(ours, plain)
    check_same(ours, plain)


def test_a_prefetch_that_is_refused_is_nobodys_error() -> None:
    ours, plain = trained({"device_memory": "80KiB", **SMALL})
    manager = boosted(ours.model).manager
    fetch, refused = manager.fetch, []

    def no_prefetch(chunk: Any, keep: Any = (), background: bool = False, overdraw: bool = False) -> None:
        if background:
            refused.append(chunk)
            raise SHAPES["torch on CPU"]()
        fetch(chunk, keep, overdraw=overdraw)

    manager.fetch = no_prefetch  # type: ignore[method-assign]
    go_on(ours, plain)
    del manager.fetch
    assert refused
    check_same(ours, plain)


def test_the_error_for_a_unit_without_room_names_unit_need_and_remedy() -> None:
    ours, _ = trained(STREAMED)
    manager = boosted(ours.model).manager
    ledger = manager.ledger
    full = ledger.capacity(Tier.DEVICE)
    manager.eviction.evict_idle()
    ledger.resize(Tier.DEVICE, ledger.used(Tier.DEVICE))
    with pytest.raises(OutOfMemory, match=r"device tier out of memory.*needs [\d.]+ (B|KiB), .*\(for 0\)") as caught:
        ours.loss(2)
    assert "set device_memory to" in str(caught.value)
    ledger.resize(Tier.DEVICE, full)
    ours.step(3)
    check_at_rest(ours.model)


def test_other_errors_are_none_of_ours() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))
    ours, _ = trained(STREAMED)
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        ours.model(torch.zeros(2, WIDTH + 1))
    assert not isinstance(caught.value, OutOfMemory)


# -- by the operating system's hand


WHERE = ("forward", "loss.backward", "booster.backward", "evaluation")


@pytest.fixture(scope="module")
def said() -> Any:
    """What became of each kind of shortage, in a child under RLIMIT_DATA, and of a run that never saw one."""
    root = Path(__file__).parents[3]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable, str(Path(__file__).parent / "child_out_of_memory.py"), *WHERE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("where", WHERE)
def test_a_real_shortage_is_survived_bit_for_bit(where: str, said: Any) -> None:
    failed_with, numbers = said[where]
    assert failed_with == ("RuntimeError" if where == "loss.backward" else "OutOfMemory")
    assert numbers == said["plain"][1]
