"""``p.data = tensor`` counts, wherever the chunk is: ``vector_to_parameters``, pruning and averaging do it."""

from typing import Any

import pytest
import torch
from loop import PLACEMENTS, SMALL, Trained, check_same
from torch import Tensor, nn

STREAMED = {"device_memory": "36KiB", **SMALL}


def values(run: Trained, seed: int) -> Tensor:
    total = sum(p.numel() for p in run.model.parameters())
    return torch.randn(total, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.fixture(params=PLACEMENTS)
def placement(request: Any, tmp_path: Any, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = PLACEMENTS[request.param]
    return found


@pytest.mark.one_in(2)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_training_goes_on_from_what_was_assigned(placement: dict[str, Any], when: str) -> None:
    ours, plain = Trained(placement), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        for step in range(3):
            if when == "before":
                nn.utils.vector_to_parameters(values(run, step), run.model.parameters())
            run.backward(run.loss(step))
            if when == "between":
                nn.utils.vector_to_parameters(values(run, step), run.model.parameters())
            run.optimizer.step()
            if when == "after":  # updates are still under way
                nn.utils.vector_to_parameters(values(run, step), run.model.parameters())
            run.optimizer.zero_grad()
    check_same(ours, plain)


def test_the_master_gets_the_digits_that_the_compute_dtype_has_no_room_for() -> None:
    run = Trained(STREAMED, precision="bf16")
    run.step(0)
    assigned = {}
    for seed, (name, parameter) in enumerate(run.model.named_parameters()):
        assigned[name] = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data = assigned[name]
    saved = run.model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in assigned.items())
    assert run.model[0].weight.dtype == torch.bfloat16
    run.step(1)


def test_what_is_loaded_later_wins() -> None:
    run = Trained(STREAMED)
    run.step(0)
    before = run.model.state_dict()
    for parameter in run.model.parameters():
        parameter.data = torch.zeros(parameter.shape)
    run.model.load_state_dict(before)
    after = run.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_another_shape_is_refused_and_the_parameter_keeps_its_values() -> None:
    run = Trained(STREAMED)
    run.step(0)
    before = run.model.state_dict()
    first = next(run.model.parameters())
    with pytest.raises(
        ValueError, match=r"shape \(3,\) was assigned to the data of 0\.weight, whose shape is \(64, 64\)"
    ):
        first.data = torch.zeros(3)
    after = run.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    run.step(1)
