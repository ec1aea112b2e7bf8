"""Arguments and capacities that cannot work are named, before anything is changed."""

from typing import Any

import pytest
import torch
from loop import SMALL, build
from parity import masters
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import OutOfMemory
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam


def tiny_lazy() -> nn.Module:
    with LazyInitContext():
        return build()


@pytest.mark.parametrize("start", [build, tiny_lazy], ids=["eager", "lazy"])
def test_capacities_that_cannot_work_are_named_before_anything_is_changed(start: Any, tmp_path: Any) -> None:
    model = start()
    optimizer = HybridAdam(model.parameters())
    (tmp_path / "file").write_text("")
    for plugin, error, says in (
        ({"host_memory": "200KiB"}, OutOfMemory, "offload_dir="),
        (
            {"host_memory": "300KiB", "offload_dir": tmp_path, "disk_memory": "9KiB", **SMALL},
            OutOfMemory,
            "disk_memory",
        ),
        ({"host_memory": "300KiB", "offload_dir": tmp_path / "file" / "x", **SMALL}, ValueError, "offload_dir"),
        ({"device_memory": 100}, OutOfMemory, "device_memory to"),
        ({"host_memory": 100, "offload_dir": tmp_path}, OutOfMemory, "host_memory"),
    ):
        with pytest.raises(error, match=says):
            Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **plugin)).boost(model, optimizer)
    # None of this has touched it.
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, optimizer)
    expected = dict(build().named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in masters(model).items())


def test_arguments_that_make_no_sense_are_refused_by_name(tmp_path: Any) -> None:
    for arguments, error, says in (
        ({"placement_policy": "const"}, ValueError, "'auto' or 'static'"),
        ({"precision": "fp8"}, ValueError, "bf16"),
        ({"host_memory": "many"}, ValueError, "host_memory"),
        ({"host_memory": 0}, ValueError, "host_memory"),
        ({"disk_memory": "1GiB"}, ValueError, "offload_dir"),
        ({"max_prefetch": -1}, ValueError, "max_prefetch"),
        ({"placement_policy": "static", "offload_optim_frac": 1.5}, ValueError, "offload_optim_frac"),
        ({"chunk_config_dict": {2: {"chunk_size": 1}}}, ValueError, "chunk_config_dict"),
        ({"tp_size": 2}, NotImplementedError, "tp_size"),
        ({"master_weights": False}, NotImplementedError, "master_weights"),
    ):
        with pytest.raises(error, match=says):
            GeminiPlugin(**arguments)
    with pytest.warns(DeprecationWarning, match="static"):
        GeminiPlugin(placement_policy="cpu")
