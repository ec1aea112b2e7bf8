"""What goes wrong in user code, and what it leaves behind: nothing."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from loop import SMALL, Trained, check_same

from gemini.boosted import boosted


class Accident(Exception):
    pass


def fail(*_: Any) -> None:
    raise Accident


@pytest.mark.one_in(2)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("plain_backward", [False, True], ids=["booster", "loss.backward"])
def test_after_an_exception_the_next_step_is_as_if_nothing_had_been(
    where: str, plain_backward: bool, placement: dict[str, Any]
) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
        run.step(1)
    layer = ours.model[6]
    if where == "forward":
        handle = layer.register_forward_hook(fail)
        with pytest.raises(Accident):
            ours.loss(2)
        handle.remove()
    else:
        loss = ours.loss(2)
        handle = layer.weight.register_hook(fail)
        with pytest.raises(Accident):
            loss.backward() if plain_backward else ours.backward(loss)
        handle.remove()
    for run in (ours, plain):
        torch.manual_seed(9)
        run.step(3)
        run.step(4)
    check_same(ours, plain)


@pytest.mark.one_in(3)  # test_out_of_memory.py has the same in all of them
def test_out_of_memory_in_the_model_leaves_everything_usable(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("the activations are too large")

    handle = ours.model[9].register_forward_pre_hook(exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        ours.loss(0)
    handle.remove()
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(1)
    check_same(ours, plain)


@pytest.mark.parametrize("in_backward", [False, True], ids=["", "updated in backward"])
def test_a_model_that_is_dropped_gives_its_memory_and_files_back(in_backward: bool, tmp_path: Any) -> None:
    threads = set(threading.enumerate())
    placement = {"host_memory": "300KiB", "offload_dir": tmp_path, "update_in_backward": in_backward, **SMALL}
    run = Trained(placement)
    run.step(0)
    workers = [
        t
        for t in set(threading.enumerate()) - threads
        if t.name.startswith(("gemini-memory-update", "gemini-memory-fetch"))
    ]
    assert workers
    chunk = weakref.ref(boosted(run.model).manager.chunks[0])
    model = weakref.ref(run.model)
    del run
    gc.collect()
    assert model() is None
    assert chunk() is None
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_a_model_lives_for_as_long_as_its_optimizer(placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    kept, expected = ours.optimizer, plain.optimizer
    del ours.model, plain.model, ours.booster
    gc.collect()
    for optimizer in (kept, expected):
        parameters = optimizer.param_groups[0]["params"]
        torch.stack([parameter.square().sum() for parameter in parameters]).sum().backward()
        optimizer.step()
    for one, other in zip(kept.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)


class FailsAtCall:
    """While on: the so-manyth call of what moves data raises, before it does anything."""

    def __init__(self, run: Trained, at: int) -> None:
        manager = boosted(run.model).manager
        self.at, self.count = at, 0
        self.targets: list[tuple[Any, str]] = [(manager, name) for name in ("fetch", "pin")]
        self.targets += [(manager.full_copies, "evict"), (manager.eviction, "make_room")]
        self.targets += [(manager.device, name) for name in ("grow", "upload", "download", "store")]
        self.targets += [(chunk.gradient, "add") for chunk in manager.chunks if chunk.gradient is not None]

    def __enter__(self) -> "FailsAtCall":
        for target, name in self.targets:
            setattr(target, name, self._counting(getattr(target, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for target, name in self.targets:
            delattr(target, name)

    def _counting(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise Accident
            return original(*args, **kwargs)

        return call


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("plain_backward", [False, True], ids=["booster", "loss.backward"])
def test_a_failure_at_any_call_of_a_step_leaves_no_trace(plain_backward: bool, placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
        run.step(1)
    at = failures = 0
    while at == failures:
        at += 1
        with FailsAtCall(ours, at) as injected:
            torch.manual_seed(at)
            try:
                loss = ours.loss(1000 + at)
                loss.backward() if plain_backward else ours.backward(loss)
            except Accident:
                failures += 1
        if injected.count < at:
            ours.optimizer.zero_grad()  # it went through: there was no such call
        for run in (ours, plain):
            torch.manual_seed(500 + at)
            run.step(at)
        assert [c.pins for c in boosted(ours.model).manager.chunks if c.pins] == []
        if at % 10 == 0:
            check_same(ours, plain)
    assert failures > 20
    check_same(ours, plain)
