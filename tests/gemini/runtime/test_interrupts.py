"""``KeyboardInterrupt`` between two instructions of a move, in a notebook whose user then trains on."""

import contextlib
from typing import Any

import pytest
import torch
from loop import Trained, check_same

from gemini.boosted import boosted

TARGETS = {
    "manager": ("fetch", "pin"),
    "full copies": ("begin", "arrive", "evict"),
    "device": ("grow", "shrink"),
    "chunk": ("begin_fetch", "finish_fetch", "evict", "_move_to", "unpin"),
    "bindings": ("hide", "expose"),
}


class InterruptedAfterCall:
    """Raises KeyboardInterrupt when the call number ``at`` of what moves chunks has done its work."""

    def __init__(self, run: Trained, at: int) -> None:
        manager = boosted(run.model).manager
        self.at, self.count = at, 0
        objects = {
            "manager": [manager],
            "full copies": [manager.full_copies],
            "device": [manager.device],
            "chunk": manager.chunks,
            "bindings": [chunk.bindings for chunk in manager.chunks],
        }
        self.targets = [(o, name) for kind, names in TARGETS.items() for o in objects[kind] for name in names]

    def __enter__(self) -> "InterruptedAfterCall":
        for target, name in self.targets:
            setattr(target, name, self._counting(getattr(target, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for target, name in self.targets:
            delattr(target, name)

    def _counting(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
            return result

        return call


def read(run: Trained) -> None:
    for parameter in run.model.parameters():
        parameter.detach().sum()
        parameter.norm()


def evaluate(run: Trained) -> None:
    with torch.no_grad():
        run.loss(1000)


def go_backward(run: Trained) -> None:
    run.loss(1000).backward()


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("use", [read, evaluate, go_backward])
def test_an_interrupt_after_any_call_that_moves_leaves_no_trace(use: Any, placement: dict[str, Any]) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
        run.step(1)
    manager = boosted(ours.model).manager
    at, was_interrupted = 0, True
    while was_interrupted:
        at += 1
        with InterruptedAfterCall(ours, at) as injected:
            with contextlib.suppress(KeyboardInterrupt):
                use(ours)
        was_interrupted = injected.count >= at
        for run in (ours, plain):
            run.optimizer.zero_grad()
            torch.manual_seed(500 + at)
            run.step(at)
        assert [chunk.pins for chunk in manager.chunks if chunk.pins] == []
    check_same(ours, plain)
