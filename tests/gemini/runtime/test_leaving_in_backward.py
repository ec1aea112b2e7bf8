"""Backward lets go of a unit's chunks when the unit's own nodes have run, also where other units read its inputs."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from parity import Task, check_parity, run_managed, tightest
from torch import Tensor, nn
from torch.nn import functional

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.engine.visits import Visits
from gemini.nn.optimizer import HybridAdam
from gemini.units.results import Mark

WIDTH = 32
SMALL: dict[str, Any] = {"chunk_config_dict": {1: {"chunk_size": WIDTH * WIDTH}}, "max_prefetch": 0}
UPDATING = pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="after"), pytest.param({"update_in_backward": True}, id="within", marks=pytest.mark.heavy)],
)
"""When the optimizer updates: after backward or within."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Readers(nn.Module):
    """Layers that each read the state and, through a layer of its own, one and the same source."""

    def __init__(self, count: int, source: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.source = source
        self.readers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(count)])
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        source = self.source(self.encoder, x)
        for reader, layer in zip(self.readers, self.layers, strict=True):
            x = torch.tanh(layer(x + reader(source)))
        return x


SOURCES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "encoded": lambda encoder, x: encoder(x),
    "data": lambda encoder, x: x * 2,
    "a leaf": lambda encoder, x: x.clone().requires_grad_(True),
}


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, WIDTH, generator=generator) for _ in range(count)]


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@UPDATING
def test_what_a_device_needs_does_not_grow_with_the_readers_of_a_tensor(source: Any, options: Any) -> None:
    few = Task(lambda: Readers(2, source), batches(), mean_square)
    many = Task(lambda: Readers(9, source), batches(), mean_square)
    capacity = tightest(few, "device", **SMALL, **options)
    check_parity(many, device_memory=capacity, **SMALL, **options)


def test_backward_leaves_what_it_runs_in_part() -> None:
    """The gradient of the data alone takes no more room than those of all parameters."""
    task = Task(lambda: Readers(4, SOURCES["encoded"]), batches(), mean_square)
    plain, x = task.build(), batches()[0].requires_grad_(True)
    model = copy.deepcopy(plain)
    capacity = tightest(task, "device", **SMALL)
    plugin = GeminiPlugin(device_memory=capacity, precision="fp32", telemetry=False, **SMALL)
    model, *_ = Booster(plugin=plugin).boost(model, HybridAdam(model.parameters()))
    for _ in range(2):
        (ours,) = torch.autograd.grad(mean_square(model, x), x)
        (theirs,) = torch.autograd.grad(mean_square(plain, x), x)
        assert torch.equal(ours, theirs)


class Opened:
    """A visit, as far as it is asked when its last node has run."""

    def __init__(self, number: int) -> None:
        self.begin = Mark(number, 0)


def test_a_node_says_nothing_of_visits_that_another_thread_came_to() -> None:
    visits, alone, shared, theirs = Visits(), Opened(5), Opened(5), Opened(5)
    for visit in (alone, shared):
        visits.join_backward(1, visit)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as elsewhere:
        for visit in (shared, theirs):
            elsewhere.submit(visits.join_backward, 1, visit).result()  # type: ignore[arg-type]
        assert visits.passed(1, 5) == []
        assert visits.passed(1, 4) == [alone]
        assert elsewhere.submit(visits.passed, 1, 4).result() == [theirs]
    assert visits.of_backward(1) == [shared]


PENALTIES: list[Tensor] = []


class PenalisedElsewhere(nn.Module):
    """Part of its graph is in no output: when the output's nodes have run, that part has not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        PENALTIES.append((self.weight @ self.weight).square().mean())
        return functional.linear(x, self.weight).tanh()


class TwoOutputs(nn.Module):
    """One of them has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 6) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.used, x @ self.unused


class MadeWeight(nn.Module):
    """Its weight comes from others, whose nodes run after those that read the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, (self.weight * self.scale).tanh() * self.scale)


class Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(shift)
        return x + shift.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (shift,) = ctx.saved_tensors
        return gradient, (gradient * 2 * shift).sum((0, 1))


class OfAFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return Shifted.apply(x, self.shift)  # type: ignore[no-any-return]


class Turned(torch.autograd.Function):
    """Returns a view of what it gets, and reads a parameter in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        return (gradient * scale).transpose(0, 1), None


class ViewOfAFunction(nn.Module):
    def __init__(self, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.weight, self.scale = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        turned = Turned.apply(x @ self.weight, self.scale[0])
        return turned if self.is_last else turned.transpose(0, 1)  # type: ignore[no-any-return]


class View(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).view(-1, WIDTH)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 1.1))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight)


def plainly(part: nn.Module, x: Tensor) -> Tensor:
    return part(x)  # type: ignore[no-any-return]


def changed_in_place(part: nn.Module, x: Tensor) -> Tensor:
    return torch.relu_(part(x).add_(0.5)).view(x.shape)


PARTS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "a penalty in a list elsewhere": (PenalisedElsewhere, plainly),
    "an output without a part in the loss": (TwoOutputs, lambda part, x: part(x)[0]),
    "a weight made of others": (MadeWeight, plainly),
    "a function of one's own": (OfAFunction, plainly),
    "a view that a function of one's own returns": (
        lambda: ViewOfAFunction(True),
        lambda part, x: part(x).transpose(0, 1),
    ),
    "a view of what a function of one's own returns": (lambda: ViewOfAFunction(False), plainly),
    "a layer whose output is changed in place": (lambda: nn.Linear(WIDTH, WIDTH), changed_in_place),
    "a view that is changed in place": (View, changed_in_place),
    "an input changed in place": (InPlace, lambda part, x: part(x * 1.0)),
    "a view of an input changed in place": (InPlace, lambda part, x: part((x * 1.0).view(-1, WIDTH)).view(x.shape)),
    "a recurrent layer": (lambda: nn.GRU(WIDTH, WIDTH), lambda part, x: part(x)[0]),
}


class Chain(nn.Module):
    """Every part reads what the first layer made, too."""

    def __init__(self, part: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.call = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), call
        self.parts = nn.ModuleList([part() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = source = self.first(x)
        for part in self.parts:
            x = self.call(part, x) + self.call(part, source)
        loss = self.last(x).square().mean() + 0.01 * sum(PENALTIES)
        PENALTIES.clear()
        return loss


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("part", "call"), PARTS.values(), ids=PARTS)
@UPDATING
def test_what_a_unit_leaves_for_backward_finds_its_parameters(part: Any, call: Any, options: Any) -> None:
    task = Task(lambda: Chain(part, call), batches(), lambda model, x: model(x))
    check_parity(task, device_memory=tightest(task, "device", **SMALL, **options), **SMALL, **options)


class Token:
    """Held by a node."""


def nodes_of(tensor: Tensor) -> set[Any]:
    found, ahead = set(), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found and not hasattr(node, "variable"):
            found.add(node)
            ahead += [following for following, _ in node.next_functions]
    return found


def test_a_graph_goes_with_its_loss() -> None:
    """Nothing that backward's hooks hold leads back to the graph: the garbage collector would not see that."""
    tokens: list[weakref.ref[Token]] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        for node in nodes_of(output):
            token = Token()
            node.register_prehook(lambda gradients, held=token: None)
            tokens.append(weakref.ref(token))
        return output.square().mean()  # type: ignore[no-any-return]

    run_managed(Task(lambda: Readers(2, SOURCES["encoded"]), batches(), loss))
    gc.collect()
    assert len(tokens) > 20
    assert not any(token() for token in tokens)
