"""A forward that ran out of memory runs again in more room, and nobody can tell from what it leaves."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loop import SMALL, WIDTH, Trained, batch, check_same
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.chunk import Tier
from gemini.errors import OutOfMemory
from gemini.memory.giving import Shortage, bytes_to_give, is_hopeless

SHORT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one RAM": {"host_memory": "2MiB", "offload_dir": "disk", **SMALL},
    "a device of its own": {"device_memory": "80KiB", "host_memory": "2MiB", "offload_dir": "disk", **SMALL},
    "without a disk": {"device_memory": "80KiB", "host_memory": "2MiB", **SMALL},
}


class Habits(nn.Module):
    """Does in its forward what forwards may do beside computing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(3))
        self.count, self.seen, self.options, self.kinds = 0, list[float](), dict[str, int](), set[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + self.calls
        self.count += 1
        self.seen.append(random.random())
        self.options["last"] = self.count
        self.kinds.add(self.count)
        x = self.norm(self.first(x)) * float(np.random.rand())
        return self.last(x)  # type: ignore[no-any-return]

    def left(self) -> list[Any]:
        buffers = [buffer.clone() for buffer in self.buffers()]
        return [*(b.tolist() for b in buffers), self.count, list(self.seen), dict(self.options), set(self.kinds)]


class WithHabits(Trained):
    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        layers = [module for _ in range(3) for module in (Habits(), nn.Dropout(0.2))]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 8))

    def left(self) -> list[Any]:
        return [module.left() for module in self.model.modules() if isinstance(module, Habits)]


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextmanager
def short(run: Trained, times: int, at: int = -1, free_bytes: int = 16 << 10) -> Iterator[list[int]]:
    """The last module (or another one) finds no memory, so often, where the system has next to none."""
    calls, eviction = [0], boosted(run.model).manager.eviction
    headroom = eviction.headroom

    def fail(*_: Any) -> None:
        calls[0] += 1
        eviction.headroom = headroom if calls[0] > times else lambda: free_bytes
        if calls[0] <= times:
            raise RuntimeError(SHORT)

    handle = list(run.model.children())[at].register_forward_hook(fail)
    try:
        yield calls
    finally:
        handle.remove()
        eviction.headroom = headroom


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_it_leaves_what_a_forward_leaves_that_had_room(placement: dict[str, Any]) -> None:
    ours, plain = WithHabits(placement), WithHabits(None)
    for number in range(3):
        losses = []
        for run in (ours, plain):
            seed(number)
            if run is ours and number < 2:
                with short(ours, 1) as calls:
                    losses.append(run.step(number))
                assert calls[0] == 2
            else:
                losses.append(run.step(number))
        assert losses[0] == losses[1] and ours.left() == plain.left()
    check_same(ours, plain)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc"), OutOfMemory("of a move")])
def test_evaluation_runs_again_as_well(error: Exception) -> None:
    ours, plain = Trained(PLACEMENTS["one RAM"]), Trained(None)
    calls = [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise error

    handle = ours.model[4].register_forward_pre_hook(fail)
    found = []
    for run in (ours, plain):
        run.model.eval()
        with torch.no_grad():
            found.append(run.model(batch(0)))
    assert torch.equal(*found) and calls[0] == 2
    handle.remove()
    assert error.__traceback__ is None  # it lives on, and the model is not to


def test_gradients_of_earlier_micro_batches_are_kept() -> None:
    ours, plain = Trained(PLACEMENTS["one RAM"]), Trained(None)
    for run in (ours, plain):
        for number in range(3):
            torch.manual_seed(number)
            if run is ours and number < 2:  # states and full copies make way; gradients of now stay
                with short(ours, 1):
                    loss = run.loss(number)
            else:
                loss = run.loss(number)
            run.backward(loss)
        run.optimizer.step()
        run.optimizer.zero_grad()
    check_same(ours, plain)


def test_homes_go_to_disk_for_it_and_only_what_can_go_is_tried() -> None:
    ours, plain = Trained(PLACEMENTS["one RAM"]), Trained(None)
    manager = boosted(ours.model).manager
    assert manager.ledger.used(Tier.DISK) == 0
    with short(ours, 100) as calls, pytest.raises(OutOfMemory, match="No full copies are left") as caught:
        ours.loss(0)
    assert 2 <= calls[0] <= 12 and manager.ledger.used(Tier.DISK) > 0
    assert isinstance(caught.value.__cause__, RuntimeError)
    for run in (ours, plain):
        torch.manual_seed(1)
        run.step(1)
    check_same(ours, plain)


class ScalesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)


class Renormalises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


class Odd(Trained):
    """Begins with a module that changes what cannot be restored."""

    first: type[nn.Module] = ScalesInput

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(self.first(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8))


class OddWeight(Odd):
    first = Renormalises


@pytest.mark.parametrize(("cls", "what"), [(Odd, "one of its inputs"), (OddWeight, "a tensor of the model")])
def test_what_cannot_be_restored_is_said_and_there_is_room_the_next_time(cls: type[Odd], what: str) -> None:
    ours = cls(PLACEMENTS["one RAM"])
    with short(ours, 1) as calls, pytest.raises(OutOfMemory, match=f"could not be run again.*{what}") as caught:
        ours.loss(0)
    assert calls[0] == 1 and "may fit when tried again" in str(caught.value)
    ours.step(1)


def test_an_input_of_unknown_kind_is_not_taken_for_unchanged() -> None:
    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    ours = Trained(PLACEMENTS["one RAM"])
    first = ours.model[0]
    handle = ours.model.register_forward_pre_hook(lambda _, args: (args[0].x,), prepend=True)
    with short(ours, 1), pytest.raises(OutOfMemory, match="one of its inputs is a Box"):
        ours.model(Box(batch(0)))
    handle.remove()
    assert first is ours.model[0]


class Keeps(nn.Module):
    """Has a state deep in its attributes, which its forward changes and looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.rng, self.python, self.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.nested, self.object = {"a": [0]}, SimpleNamespace(count=0, seen=[0.0])

    def forward(self, x: Tensor) -> Tensor:
        self.nested["a"][0] += 1
        self.object.count += self.nested["a"][0]
        self.object.seen.append(float(torch.rand((), generator=self.rng)) + self.python.random() + self.numpy.random())
        return x * (self.object.count + self.object.seen[-1])


class Deep(Trained):
    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), Keeps(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8))


def test_what_is_deep_in_attributes_is_as_it_was() -> None:
    ours, plain = Deep(PLACEMENTS["one RAM"]), Deep(None)
    for number in range(3):
        with short(ours, int(number == 1)) as calls:
            assert ours.step(number) == plain.step(number)
        assert calls[0] == 1 + (number == 1)
    check_same(ours, plain)


class Iterates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(100))

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.numbers)


class Arrays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.counts += 1
        return x * float(self.counts[0])


@pytest.mark.parametrize(("kind", "what"), [(Iterates, "holds a range_iterator"), (Arrays, "a tensor or an array")])
def test_a_state_that_cannot_be_put_back_is_said(kind: type[nn.Module], what: str) -> None:
    class Other(Trained):
        def build_model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(), nn.Linear(WIDTH, 8))

    ours = Other(PLACEMENTS["one RAM"])
    ours.step(0)
    with short(ours, 1), pytest.raises(OutOfMemory, match=what):
        ours.step(1)
    ours.step(2)


def test_an_error_of_another_kind_is_raised_at_once() -> None:
    ours = Trained(PLACEMENTS["one RAM"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours.model(torch.ones(3, 5))


def test_in_a_backward_room_is_made_and_the_message_says_so() -> None:
    ours, plain = Trained(PLACEMENTS["one RAM"]), Trained(None)
    loss, calls = ours.loss(0), [0]

    def fail(gradient: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError(SHORT)

    handle = ours.model[0].weight.register_hook(fail)
    with pytest.raises(
        OutOfMemory, match=r"the same batch may fit when tried again.*gradients of this backward are dro"
    ):
        ours.backward(loss)
    handle.remove()
    assert boosted(ours.model).manager.ledger.used(Tier.DISK) > 0
    for run in (ours, plain):
        torch.manual_seed(1)
        run.step(1)
    check_same(ours, plain)


def of(**other: Any) -> Shortage:
    known: dict[str, Any] = {"free_bytes": 400, "held_bytes": 100, "room_bytes": 100, "home_bytes": 1 << 30}
    return Shortage(**{**known, "asked_bytes": 0, "done": 1.0, "attempt": 0, **other})


def test_more_is_given_the_less_had_run_and_the_more_often_it_failed() -> None:
    mib = 1 << 20
    given = [bytes_to_give(of(free_bytes=400 * mib, held_bytes=0, done=done)) for done in (1.0, 0.5, 0.25)]
    assert given == sorted(given) and given[0] >= 100 * mib
    again = [bytes_to_give(of(attempt=attempt)) for attempt in range(4)]
    assert again == sorted(again) and again[3] >= 4 * (again[0] - (32 << 20))
    assert is_hopeless(of(asked_bytes=2 << 30)) and not is_hopeless(of(asked_bytes=1 << 30))
