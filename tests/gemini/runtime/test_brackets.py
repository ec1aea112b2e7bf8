"""Where nothing moves only the coarsest modules have hooks; whatever the model does, its numbers stay."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parity import Task, check_equal, check_parity, run_managed, run_plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.runtime import brackets

WIDTH = 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


BATCHES = [torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(n)) for n in range(6)]


def task(build: Callable[[], nn.Module], loss: Callable[[Any, Tensor], Tensor] | None = None, **more: Any) -> Task:
    return Task(build, BATCHES, loss or (lambda model, x: model(x).square().mean()), **more)


def trained(model: nn.Module, steps: int = 4, **plugin: Any) -> nn.Module:
    """A boosted model after some steps."""
    booster = Booster(plugin=GeminiPlugin(telemetry=False, precision="fp32", **plugin))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    for x in BATCHES[:steps]:
        booster.backward(model(x).mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return model


def hooked(model: nn.Module) -> set[str]:
    """The names of the modules that have a hook of ours."""
    return {name for name, module in model.named_modules() if module._forward_pre_hooks}


def test_a_model_that_never_moves_keeps_the_hooks_on_itself_alone() -> None:
    assert hooked(trained(Net())) == {""}


def test_blocks_bracket_where_the_model_is_too_large_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brackets, "LARGEST_NUMEL", 2300)  # a block has 2128 elements
    model = trained(Net(), chunk_config_dict={1: {"chunk_size": 64}})
    assert hooked(model) == {"", "blocks.0", "blocks.1", "blocks.2", "head"}
    check_parity(task(Net), chunk_config_dict={1: {"chunk_size": 64}})


def test_every_unit_brackets_where_chunks_move() -> None:
    model = trained(Net(), device_memory=2300 * 4, chunk_config_dict={1: {"chunk_size": 64}})
    assert {"blocks.0.up", "blocks.2.down", "head"} <= hooked(model)


def test_every_unit_brackets_where_chunks_are_updated_within_backward() -> None:
    assert {"blocks.0.up", "head"} <= hooked(trained(Net(), update_in_backward=True))


def test_every_unit_brackets_in_a_step_that_is_sampled() -> None:
    model = trained(Net())
    boosted(model).engine.sampling.record_step(True)
    model(BATCHES[0])
    assert {"", "blocks.0.up", "head"} <= hooked(model)
    boosted(model).engine.sampling.record_step(False)
    model(BATCHES[0])
    assert hooked(model) == {""}


class CalledInParts(Net):
    """Its loss calls the parts one by one."""


def in_parts(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return model.head(x).square().mean()


def sometimes_in_parts(model: Any, x: Tensor) -> Tensor:
    sometimes_in_parts.calls += 1  # type: ignore[attr-defined]
    return in_parts(model, x) if sometimes_in_parts.calls % 3 == 0 else model(x).square().mean()  # type: ignore[attr-defined]


sometimes_in_parts.calls = 0  # type: ignore[attr-defined]


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Reentrant(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(x)


class Captured(Net):
    """The loss is that of a tensor that an inner layer has made, and of nothing else in some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.blocks[1].up.register_forward_hook(lambda module, args, output: self.features.append(output))


def of_what_was_captured(model: Any, x: Tensor) -> Tensor:
    output, feature = model(x), model.features.pop()
    return feature.square().mean() + (output.mean() if x.sum() > 0 else 0)


class Auxiliary(Block):
    """Leaves a loss of its own in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.auxiliary = self.up.weight.square().mean() + y.mean()
        return y


class Routed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Auxiliary() for _ in range(3)])


def with_auxiliaries(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean() + sum(block.auxiliary for block in model.blocks)


class Clamped(Net):
    """Writes to weights of its parts in forward, from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            self.blocks[0].up.weight.data.clamp_(-0.05, 0.05)
            with torch.no_grad():
                self.head.weight.clamp_(-0.05, 0.05)
        return super().forward(x)


MODELS = {
    "plain": task(Net),
    "in parts": task(CalledInParts, in_parts),
    "checkpointed": task(Checkpointed),
    "reentrant": task(Reentrant),
    "captured": task(Captured, of_what_was_captured),
    "auxiliary": task(Routed, with_auxiliaries),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("largest", [None, 2300], ids=["model", "blocks"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_stay(name: str, precision: str, largest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if largest is not None:
        monkeypatch.setattr(brackets, "LARGEST_NUMEL", largest)
    what = MODELS[name]
    batches = [x.to(what.dtype if precision == "fp32" else torch.bfloat16) for x in BATCHES]
    check_parity(Task(what.build, batches, what.loss, precision), chunk_config_dict={1: {"chunk_size": 64}})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_forward_writes_to_its_parts_is_kept(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clamped = task(Clamped, precision=precision)
    coarse, _ = run_managed(clamped)
    monkeypatch.setattr(brackets, "LARGEST_NUMEL", 0)
    check_equal(coarse, run_managed(clamped)[0])


def test_numbers_stay_when_the_parts_are_called_now_and_then() -> None:
    sometimes_in_parts.calls = 0  # type: ignore[attr-defined]
    managed, _ = run_managed(task(Net, sometimes_in_parts))
    sometimes_in_parts.calls = 0  # type: ignore[attr-defined]
    check_equal(managed, run_plain(task(Net, sometimes_in_parts)))
