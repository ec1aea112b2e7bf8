"""What was compiled before it was boosted: the model, or blocks of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd_models import SMALL, EncoderDecoder, batches, mean_square
from parity import Task, check_parity, tightest

pytestmark = pytest.mark.usefixtures("one_thread")

COMPILED: dict[str, Callable[[Any, str], Any]] = {
    "the model": lambda model, backend: torch.compile(model, backend=backend),
    "the model in place": lambda model, backend: (model.compile(backend=backend), model)[1],
    "blocks": lambda model, backend: _compile_blocks(model, backend),
    "blocks in place": lambda model, backend: (
        # Not fullgraph: plain PyTorch refuses that for a container of its own that is compiled in place.
        model.encoder.compile(backend=backend),
        model.head.compile(backend=backend),
        model,
    )[2],
}


def _compiled(how: Any, backend: str) -> Any:
    torch.compiler.reset()  # it counts compilations of one piece of code over all models
    return how(EncoderDecoder(), backend)


def _compile_blocks(model: Any, backend: str) -> Any:
    model.encoder = torch.compile(model.encoder, backend=backend, fullgraph=True)
    model.decoder[2] = torch.compile(model.decoder[2], backend=backend, fullgraph=True)
    return model


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many of its own
@pytest.mark.parametrize("how", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.heavy)])
def test_what_was_compiled_before_boost_trains_as_without_management(how: Any, backend: str) -> None:
    task = Task(lambda: _compiled(how, backend), batches(3), mean_square)
    check_parity(task)
    check_parity(task, device_memory=tightest(task, "device", **SMALL), **SMALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.heavy
@pytest.mark.parametrize("how", COMPILED.values(), ids=COMPILED)
def test_what_inductor_compiled_before_boost_trains_as_without_management(how: Any) -> None:
    task = Task(lambda: _compiled(how, "inductor"), batches(3), mean_square)
    check_parity(task)
    check_parity(task, device_memory=tightest(task, "device", **SMALL), **SMALL)
