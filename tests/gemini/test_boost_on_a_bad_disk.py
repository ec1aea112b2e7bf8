"""A disk that fails while a model is boosted onto it: the model is what it was."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, build

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import OffloadError
from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:precision")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_that_fails_in_a_boost_leaves_the_model_as_it_was(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write, calls = os.pwritev, [0]
    failures = 0
    for number in range(0, 100, 3):
        model: Any = build().to(dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        strides = [parameter.stride() for parameter in model.parameters()]
        calls[0] = 0

        def failing(*args: Any, number: int = number) -> int:
            calls[0] += 1
            if calls[0] == number + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return write(*args)

        plugin = GeminiPlugin(precision="fp32", telemetry=False, **PLACEMENTS["disk"])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", failing)
            try:
                Booster(plugin=plugin).boost(model, HybridAdam(model.parameters()))
            except OffloadError:
                failures += 1
                assert type(model) is torch.nn.Sequential
                assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
                assert [p.stride() for p in model.parameters()] == strides
                assert {p.dtype for p in model.parameters()} == {dtype}
            else:
                break
    assert failures >= 2
    ours, plain = Trained(PLACEMENTS["disk"]), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(0)
        run.step(0)
    assert all(torch.equal(ours.weights()[name], value) for name, value in plain.weights().items())
