"""Random modules: shared layers, borrowed weights, work in place, branches by step, checkpoints, graphs put elsewhere;
bit for bit."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd_models import ScalesInPlace
from parity import Task, check_parity, tightest
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 16
STEPS = 3
GRAPHS = 300
BY_DEFAULT = 20
SMALL = {"chunk_config_dict": {1: {"chunk_size": 128}}}
Op = Callable[["Graph", Tensor, Tensor], Tensor]


class Pair(nn.Module):
    """A module of modules, with a parameter of its own and one that it lends."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.own, self.shared, self.bias = nn.Linear(WIDTH, WIDTH), shared, nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = functional.linear(torch.tanh(self.own(x)), self.shared.weight, self.bias)
        return {"sum": z + y, "passed": x}


class TellingLinear(nn.Linear):
    """A part of its graph goes to somebody else."""

    tell: Callable[[Tensor], None]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.tell(functional.linear(y.sin(), self.weight).square().mean())
        return y


class Graph(nn.Module):
    """Its operations are drawn once, from ``seed``; which branch a step takes depends on how often it was called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        kind = TellingLinear if seed % 4 == 3 else nn.Linear
        self.linears = nn.ModuleList([kind(WIDTH, WIDTH, bias=draw.random() < 0.7) for _ in range(4)])
        told: list[Tensor] = []
        self.take = lambda: [told.pop() for _ in range(len(told))]
        if kind is TellingLinear:
            for linear in self.linears:
                linear.tell = told.append
        if draw.random() < 0.5:
            self.linears[2].weight = self.linears[0].weight
        if draw.random() < 0.3:
            self.linears[1].requires_grad_(False)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.scale, self.pair = ScalesInPlace(WIDTH), Pair(self.linears[3])
        self.table = nn.Embedding(8, WIDTH)
        self.offset = nn.Parameter(torch.randn(WIDTH))
        self.drop = nn.Dropout(0.1)
        self.calls = 0
        self.nodes = [_node(draw, depth=0) for _ in range(draw.randint(3, 9))]
        self.picks = [(draw.randrange(4), draw.randrange(4)) for _ in self.nodes]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.take()  # what checkpoints told again in the last backward
        values = [x]
        for node, (a, b) in zip(self.nodes, self.picks, strict=True):
            values.append(
                functional.layer_norm(node(self, values[-1 - a % len(values)], values[-1 - b % len(values)]), (WIDTH,))
            )
        told = sum(self.take(), x.new_zeros(()))
        return sum(values[-3:]).square().mean() + sum(values[1:]).mean() + told  # type: ignore[union-attr]


def _node(draw: random.Random, depth: int) -> Op:
    simple: list[Callable[[], Op]] = [
        lambda: _linear(draw.randrange(4)),
        lambda: _linear(draw.randrange(4)),
        lambda: _norm(draw.randrange(2)),
        lambda: lambda graph, x, y: graph.scale(x.clone()) + y,
        lambda: lambda graph, x, y: graph.pair(x, y)["sum"],
        lambda: lambda graph, x, y: torch.relu_(graph.pair(y, x)["sum"]) + graph.offset,
        lambda: lambda graph, x, y: graph.table(x.argmax(-1) % 8) * y,
        lambda: lambda graph, x, y: graph.drop(x) + y * graph.offset,
        lambda: _borrowed(draw.randrange(4)),
    ]
    nested: list[Callable[[], Op]] = [
        lambda: _alternating(_node(draw, depth + 1), _node(draw, depth + 1), draw.randint(2, 3)),
        lambda: _checkpointed(_node(draw, depth + 1), _node(draw, depth + 1), draw.random() < 0.4),
        lambda: _without_gradients(_node(draw, depth + 1)),
        lambda: _chained(_node(draw, depth + 1), _node(draw, depth + 1)),
    ]
    return draw.choice(simple if depth == 3 or draw.random() < 0.6 else nested)()


def _linear(i: int) -> Op:
    return lambda graph, x, y: functional.gelu(graph.linears[i](x)) + y


def _norm(i: int) -> Op:
    return lambda graph, x, y: graph.norms[i](x + y)


def _borrowed(i: int) -> Op:
    return lambda graph, x, y: x @ graph.linears[i].weight.t() + y


def _alternating(first: Op, second: Op, period: int) -> Op:
    return lambda graph, x, y: (first if graph.calls % period else second)(graph, x, y)


def _chained(first: Op, second: Op) -> Op:
    return lambda graph, x, y: second(graph, first(graph, x, y), x)


def _without_gradients(inner: Op) -> Op:
    def run(graph: Graph, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            seen = inner(graph, x, y)
        return x + seen

    return run


def _checkpointed(first: Op, second: Op, use_reentrant: bool) -> Op:
    def run(graph: Graph, x: Tensor, y: Tensor) -> Tensor:
        def segment(x: Tensor, y: Tensor) -> Tensor:
            return second(graph, first(graph, x, y), y)

        if use_reentrant and torch.is_grad_enabled() and not (x.requires_grad or y.requires_grad):
            return segment(x, y)  # torch warns: it would have no gradients
        return checkpoint(segment, x, y, use_reentrant=use_reentrant)  # type: ignore[no-any-return]

    return run


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, WIDTH, generator=generator) for _ in range(STEPS)]


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # nested reentrant checkpoints
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed < BY_DEFAULT else pytest.mark.heavy) for seed in range(GRAPHS)]
)
def test_a_random_graph_trains_as_without_management(seed: int) -> None:
    task = Task(lambda: Graph(seed), batches(), lambda model, x: model(x))
    prefetch = {} if seed % 2 else {"max_prefetch": 0}
    check_parity(task, device_memory=tightest(task, "device", **prefetch, **SMALL), **prefetch, **SMALL)


AMONG_OTHERS = (41, 60, 110, 195, 237)
"""Checkpoints of both kinds within each other, layers whose output only chooses among others, and (110) a weight that a
reentrant checkpoint borrows for the first time in the second step."""


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=[] if seed < 3 or seed in AMONG_OTHERS else pytest.mark.heavy) for seed in range(GRAPHS)],
)
def test_a_random_graph_trains_so_when_chunks_are_updated_in_backward(seed: int) -> None:
    task = Task(lambda: Graph(seed), batches(), lambda model, x: model(x))
    options: dict[str, Any] = {"update_in_backward": True, **SMALL}
    check_parity(task, device_memory=tightest(task, "device", **options), **options)
