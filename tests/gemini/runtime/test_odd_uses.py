"""Models used in unusual ways: parameters, graphs and modules that no hook of a module sees."""

from typing import Any

import pytest
import torch
from odd_models import SMALL, WIDTH, Renormalised, batches, mean_square
from odd_uses import IN_PLACE, USES
from parity import Task, check_equal, check_parity, run_managed, tightest
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("prefetch", [{}, {"max_prefetch": 0}], ids=["", "without prefetching"])
@pytest.mark.parametrize("name", [*USES, *IN_PLACE])
def test_an_unusual_use_trains_as_without_management(name: str, prefetch: dict[str, Any]) -> None:
    build, loss = (USES | IN_PLACE)[name]

    def task() -> Task:
        return Task(build, batches(4), loss)

    check_parity(task())
    # Every error names a capacity; following them leads to the smallest that works.
    capacity = tightest(task(), "device", **prefetch, **SMALL)
    check_parity(task(), device_memory=capacity, **prefetch, **SMALL)


class FailsAtFirst(nn.Linear):
    has_failed = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).sin()
        if not self.has_failed:
            self.has_failed = True
            raise ArithmeticError(f"with {y.numel()} numbers")
        return y


def test_a_call_that_failed_tells_nothing_of_what_a_unit_leaks() -> None:
    model = FailsAtFirst(WIDTH, WIDTH)
    model, *_ = Booster(plugin=GeminiPlugin(precision="fp32")).boost(model, HybridAdam(model.parameters()))
    unit = boosted(model).hooks._units.of[model]
    with pytest.raises(ArithmeticError):
        model(batches(1)[0])
    assert unit.leaks_graph is None
    model(batches(1)[0])
    assert unit.leaks_graph is False


@pytest.mark.heavy
@pytest.mark.parametrize(("build", "loss"), USES.values(), ids=USES)
def test_an_unusual_use_trains_as_without_management_in_bf16_and_from_disk(
    build: Any, loss: Any, tmp_path: Any
) -> None:
    check_parity(Task(build, batches(4), loss), host_memory="420KiB", offload_dir=tmp_path, **SMALL)
    data = [x.bfloat16() for x in batches(4)]
    capacity = tightest(Task(build, data, loss, "bf16"), "device", **SMALL)
    check_parity(Task(build, data, loss, "bf16"), device_memory=capacity, **SMALL)


@pytest.mark.parametrize(("build", "loss"), IN_PLACE.values(), ids=IN_PLACE)
def test_what_is_changed_in_place_reaches_the_masters_wherever_they_are(build: Any, loss: Any, tmp_path: Any) -> None:
    """Not compared with the unmanaged optimizer, whose masters overwrite what is done to bf16 parameters."""
    task = Task(build, [x.bfloat16() for x in batches(4)], loss, "bf16")
    resident, model = run_managed(task)
    assert boosted(model).manager.moves.evict_count == 0
    untouched, _ = run_managed(Task(task.build, task.batches, _unedited, "bf16"))
    assert any(not torch.equal(resident.weights[name], untouched.weights[name]) for name in resident.weights)
    for plugin in ({"device_memory": tightest(task, "device", **SMALL)}, {"host_memory": "420KiB"}):
        streamed, _ = run_managed(task, offload_dir=tmp_path, **plugin, **SMALL)
        check_equal(streamed, resident)


def _unedited(model: Any, x: Tensor) -> Tensor:
    if isinstance(model, Renormalised):
        model.embedding.max_norm = None
    return mean_square(model, x)
