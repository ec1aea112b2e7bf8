"""What HybridAdam refuses, before anything has changed."""

from typing import Any

import pytest
import torch
from torch import nn

from gemini.nn.optimizer import HybridAdam


def test_sparse_gradients_are_refused_before_any_parameter_changes() -> None:
    dense, embedding = nn.Parameter(torch.ones(16)), nn.Embedding(10, 4, sparse=True)
    optimizer = HybridAdam([{"params": [dense]}, {"params": embedding.parameters()}])
    (dense.sum() + embedding(torch.tensor([1, 2])).sum()).backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(16))
    assert not optimizer.state


def test_complex_parameters_are_refused_and_leave_no_group_behind() -> None:
    optimizer = HybridAdam([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"complex64.*view_as_real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1e-8), ("weight_decay", -1.0)],
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        HybridAdam([nn.Parameter(torch.ones(2))], **{name: value})
    optimizer = HybridAdam([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value})
    assert len(optimizer.param_groups) == 1


def test_placing_states_on_disk_is_the_plugins_work() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"GeminiPlugin\(offload_dir=\.\.\.\)"):
        HybridAdam(params, nvme_offload_fraction=0.5, nvme_offload_dir="somewhere")
    optimizer = HybridAdam(params, nvme_offload_fraction=0.0, nvme_offload_dir="somewhere")
    assert (optimizer.nvme_offload_fraction, optimizer.nvme_offload_dir) == (0.0, "somewhere")


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_options_of_torch_that_it_lacks_are_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        HybridAdam([{"params": [nn.Parameter(torch.ones(2))], option: True}])
