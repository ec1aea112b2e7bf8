"""A model compiled after it was boosted is refused with the way to do it, and trains on uncompiled."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loop import SMALL, Trained, batch, check_same
from torch import nn

COMPILED: dict[str, Callable[[Any], Any]] = {
    "the model": lambda model: torch.compile(model, backend="eager"),
    "the model in place": lambda model: (model.compile(backend="eager"), model)[1],
    "a part in place": lambda model: (model[3].compile(backend="eager"), model)[1],
    "what it is part of": lambda model: torch.compile(nn.Sequential(model, nn.Identity()), backend="eager"),
}


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many of its own
@pytest.mark.parametrize("how", COMPILED.values(), ids=COMPILED)
def test_it_is_refused_and_the_model_trains_on(how: Callable[[Any], Any]) -> None:
    ours, plain = Trained({"device_memory": "36KiB", **SMALL}), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    compiled = how(ours.model)
    with pytest.raises(RuntimeError, match=r"booster\.boost\(torch\.compile\(model\), optimizer\)"):
        compiled(batch(1))
    for module in ours.model.modules():
        module._compiled_call_impl = None
    for run in (ours, plain):
        torch.manual_seed(8)
        run.step(1)
    check_same(ours, plain)
