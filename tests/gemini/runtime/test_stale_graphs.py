"""A graph from before a step is refused as in plain PyTorch: old activations and new weights give no gradient."""

from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, check_same
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.timeout(60)

MODIFIED = "modified by an inplace operation"


@pytest.mark.parametrize(
    ("placement", "precision"), [(None, "fp32"), *((name, dtype) for name in PLACEMENTS for dtype in ("fp32", "bf16"))]
)
def test_a_backward_through_weights_that_a_step_has_changed_raises(
    placement: str | None, precision: str, tmp_path: Any
) -> None:
    options = None if placement is None else dict(PLACEMENTS[placement])
    if options is not None and "offload_dir" in options:
        options["offload_dir"] = tmp_path
    run = Trained(options, precision)
    run.step(0)
    loss = run.loss(1)
    loss.backward(retain_graph=True)
    run.optimizer.step()
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()
    run.optimizer.zero_grad()
    run.step(2)
    if run.is_managed and precision == "fp32":
        plain = Trained(None)
        for step in range(3):
            plain.step(step)
        check_same(run, plain)


class Lookup(nn.Module):
    """Its backward needs no weight: in plain PyTorch a graph from before a step still runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, index: Tensor) -> Tensor:
        return self.table(index) + self.shift  # type: ignore[no-any-return]


def trained_on_old_graphs(is_managed: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model: Any = Lookup()
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-2)
    if is_managed:
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
        model, optimizer, *_ = booster.boost(model, optimizer)
    for step in range(3):
        loss = (model(torch.arange(step, step + 4)) * torch.arange(8)).sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_where_no_weight_is_needed_it_runs_as_in_plain_pytorch() -> None:
    ours, plain = trained_on_old_graphs(True), trained_on_old_graphs(False)
    assert [name for name in plain if not torch.equal(ours[name], plain[name])] == []


def test_parameters_without_a_gradient_in_the_step_stay_usable() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
    x = torch.ones(2, 8, requires_grad=True)
    first, second = model[0](x).sum(), model[1](x).sum()
    second.backward()
    optimizer.step()
    optimizer.zero_grad()
    first.backward()  # its weights are as they were
    with pytest.raises(RuntimeError, match=r"second time|already been freed"):
        second.backward()
