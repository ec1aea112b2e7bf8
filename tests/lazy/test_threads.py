"""Several threads: each records for itself, and tensors of one tape may be used by many."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from gemini.lazy import LazyInitContext, is_lazy, materialize

WAIT = 30


def in_thread(action):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result(WAIT)


def test_a_context_in_one_thread_does_not_reach_another():
    with LazyInitContext():
        assert is_lazy(torch.empty(1))
        assert in_thread(lambda: type(nn.Linear(2, 2).weight)) is nn.Parameter
        assert not is_lazy(in_thread(lambda: torch.zeros(2)))


def test_threads_that_build_at_once_each_get_the_model_of_the_state_they_found():
    torch.manual_seed(0)
    eager = nn.Sequential(*(nn.Linear(5, 5) for _ in range(20)))
    torch.manual_seed(0)
    barrier = threading.Barrier(4)

    def build():
        barrier.wait(WAIT)
        with LazyInitContext():
            return nn.Sequential(*(nn.Linear(5, 5) for _ in range(20)))

    with ThreadPoolExecutor(4) as pool:
        models = [future.result(WAIT) for future in [pool.submit(build) for _ in range(4)]]
    tapes = {id(model[0].weight._lazy.tape) for model in models}
    assert len(tapes) == 4
    for model in models:
        materialize(model)
        assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), model.parameters(), strict=True))


@pytest.fixture
def _eager_to_switch():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_to_switch")
def test_many_threads_may_work_on_tensors_of_one_tape():
    with LazyInitContext():
        model = nn.Module()
        model.kept = [torch.zeros(4, 4) for _ in range(8)]
    barrier = threading.Barrier(8)

    def work(i: int) -> None:
        barrier.wait(WAIT)
        for step in range(60):
            model.kept[i].add_(i)[step % 4].mul_(2).copy_(model.kept[i][0].to(torch.bfloat16))

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, i) for i in range(8)]:
            future.result(WAIT)
    materialize(model)
    for i, got in enumerate(model.kept):
        expected = torch.zeros(4, 4)
        for step in range(60):
            expected.add_(i)[step % 4].mul_(2).copy_(expected[0].to(torch.bfloat16))
        assert torch.equal(got, expected)


def test_a_context_is_left_in_the_thread_that_entered_it():
    context = LazyInitContext()
    with context:
        with pytest.raises(RuntimeError, match="in the thread that entered it"):
            in_thread(lambda: context.__exit__(None, None, None))
        assert is_lazy(torch.empty(1))
    assert not is_lazy(torch.empty(1))


def test_a_model_may_be_materialised_in_another_thread():
    torch.manual_seed(0)
    eager = nn.Linear(4, 4)
    torch.manual_seed(0)
    with LazyInitContext():
        lazy = nn.Linear(4, 4)
    assert in_thread(lambda: materialize(lazy)) is lazy
    assert torch.equal(eager.weight, lazy.weight)
