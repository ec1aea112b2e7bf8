"""A chunk's gradient is announced as complete once, before its update, whenever chunks are updated."""

from collections import Counter
from typing import Any

import pytest
from backward_runs import Run, trainable

from gemini.boosted import boosted
from gemini.chunk import GradientBuffer, SingleProcess

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the gradient of each chunk was complete."""
    counts: Counter[int] = Counter()

    def count(self: SingleProcess, gradient: GradientBuffer) -> None:
        assert gradient.present
        counts[gradient.layout.index] += 1

    monkeypatch.setattr(SingleProcess, "reduce_gradient", count)
    return counts


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_once_in_each_step(
    update_in_backward: bool, backward_placement: dict[str, Any], complete: Counter[int]
) -> None:
    run = Run(backward_placement, "fp32", update_in_backward=update_in_backward)
    for step in (1, 2, 3):
        run.step(step)
        assert len(complete) == trainable(run.model)
        assert set(complete.values()) == {step}


def test_at_the_latest_when_they_are_clipped(backward_placement: dict[str, Any], complete: Counter[int]) -> None:
    run = Run(backward_placement, "fp32")
    run.backward(run.loss(0))
    assert not complete
    run.optimizer.clip_grad_by_norm(1.0)
    assert set(complete.values()) == {1}
    run.optimizer.step()
    assert set(complete.values()) == {1}


def test_again_when_more_was_added(complete: Counter[int]) -> None:
    run = Run({}, "fp32")
    for i in range(2):
        run.backward(run.loss(i))
        run.optimizer.clip_grad_by_norm(1.0)
    run.optimizer.step()
    assert set(complete.values()) == {2}
    assert len(complete) == sum(chunk.is_trainable for chunk in boosted(run.model).manager.chunks)
