"""Models that use parameters in unusual ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH = 32
SMALL = {"chunk_config_dict": {1: {"chunk_size": 256}}}


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, WIDTH, generator=generator) for _ in range(count)]


def layers(count: int = 4) -> nn.Sequential:
    return nn.Sequential(*[m for _ in range(count) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU())])


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output if output.dim() == 0 else output.float().square().mean()  # type: ignore[no-any-return]


class Renormalised(nn.Module):
    """Its embedding is changed in place by its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rest = nn.Embedding(16, WIDTH, max_norm=0.5), layers(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x + self.embedding(x[..., 0].abs().mul(9).long() % 16))  # type: ignore[no-any-return]


class ScalesInPlace(nn.Module):
    """Works in place on its input."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.1))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(self.weight)
        return x


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = layers(3), layers(2), nn.Linear(WIDTH, WIDTH)
        self.token = nn.Parameter(torch.randn(WIDTH))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x + self.token)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encode(x)))  # type: ignore[no-any-return]


class BorrowsAWeight(nn.Module):
    """In every third call only: no first step sees it."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.first, self.lender, self.last = layers(2), nn.Linear(WIDTH, WIDTH), layers(2)
        self.every, self.calls = every, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.last(self.first(x))
        return functional.linear(x, self.lender.weight) if self.calls % self.every == 0 else x


class CallsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.inner, self.scale = nn.Linear(WIDTH, WIDTH), layers(2), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self.layer(x) * self.scale
        if depth:
            x = self(x, depth - 1)
        return self.inner(x) * self.scale  # type: ignore[no-any-return]


class Forces(nn.Module):
    """Takes a derivative within its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layers(3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        energy = self.inner(x).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy * 1e-3 + force.square().mean()  # type: ignore[no-any-return]


class LeavesAPenalty(nn.Module):
    """An auxiliary loss is left in an attribute, its graph is not in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.penalty = weight(), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight)
        self.penalty = (self.weight**2).sum()
        return y


class ChoosesHard(nn.Module):
    """Nothing but the auxiliary loss has a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.penalty = weight(), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight)
        self.penalty = (y.softmax(-1) @ self.weight.t()).square().mean()
        return y.argmax(-1, keepdim=True).to(x.dtype)


class Penalised(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), kind(), nn.Linear(WIDTH, WIDTH), kind()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x.square().mean() + 0.01 * sum(p.penalty for p in self.parts if hasattr(p, "penalty"))


class Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@dataclass
class Result:
    y: Tensor
    loss: Tensor


class TakesAndReturnsABox(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = weight()

    def forward(self, box: Box) -> Box:
        return Box(functional.linear(box.value, self.weight).relu())


class ReturnsADataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Result:
        y = self.layer(x)
        return Result(y, self.head(y).square().mean())


class Boxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.ModuleList([TakesAndReturnsABox() for _ in range(3)])
        self.results = nn.ModuleList([ReturnsADataclass() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        box, loss = Box(x), torch.zeros(())
        for part in self.boxes:
            box = part(box)
        x = box.value
        for part in self.results:
            result = part(x)
            x, loss = result.y, loss + result.loss
        return x.square().mean() + loss


class ReturnsNothing(nn.Module):
    """Works on its input and returns None."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 1.1))

    def forward(self, x: Tensor) -> None:
        x.mul_(self.weight)


class UsesWhatReturnsNothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(WIDTH, WIDTH), ReturnsNothing(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.scale(x)
        return self.last(x)  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool, nested: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([layers(2) for _ in range(3)])
        self.drop, self.use_reentrant, self.nested = nn.Dropout(0.2), use_reentrant, nested

    def segment(self, i: int, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.drop(self.blocks[i](x))  # type: ignore[no-any-return]

        # Inside of a reentrant checkpoint nothing has a graph in the first pass, and torch warns of that.
        return self.again(run, x.requires_grad_(True) if x.is_leaf else x) if self.nested else run(x)

    def again(self, run: Any, x: Tensor) -> Tensor:
        return checkpoint(run, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        x = self.again(lambda x: self.segment(1, self.segment(0, x * 1.0)), x)
        return self.again(lambda x: self.segment(2, x), x)


class RecurrentCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.cell, self.rnn = nn.LSTMCell(2 * WIDTH, WIDTH), nn.RNN(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(x)
        state: Any = None
        for t in range(y.shape[1]):
            state = self.cell(y[:, t], state)
        return self.rnn(state[0].unsqueeze(1))[0]  # type: ignore[no-any-return]


class ListsOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([weight() for _ in range(4)])
        self.named = nn.ParameterDict({"scale": nn.Parameter(torch.randn(WIDTH))})
        self.hidden = [self.weights[1]]

    def forward(self, x: Tensor) -> Tensor:
        for each in self.weights:
            x = torch.tanh(x @ each)
        return functional.linear(x, self.hidden[0]) * self.named["scale"]


class RandomDepth(nn.Module):
    """Dynamic control flow: no two steps are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if torch.rand(()).item() > 0.4:
                x = torch.tanh(block(x)) + x
        return x


class RoutesTokens(nn.Module):
    """A mixture of experts: which ones run depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList([layers(1) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).flatten(0, 1)
        weights, chosen = self.router(x[:3]).softmax(-1).max(-1)
        rows = [x[i : i + 1] + weights[i] * self.experts[int(e)](x[i : i + 1]) for i, e in enumerate(chosen)]
        return torch.cat(rows)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(40, WIDTH), layers(3), nn.Linear(WIDTH, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.table((x[:, :, 0] * 10).long().abs() % 40)))  # type: ignore[no-any-return]


class RunsAPartTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = layers(2), layers(2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return self.student(x + target) + self.teacher(x)  # type: ignore[no-any-return]


class Symmetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, w: Tensor) -> Tensor:
        return (w + w.t()) * self.factor


def parametrized() -> nn.Module:
    model = layers(3)
    for i in (0, 2):
        nn.utils.parametrize.register_parametrization(model[i], "weight", Symmetric())
    return model


def with_hooks() -> nn.Module:
    model = layers(4)
    model[0].register_forward_hook(lambda module, args, output: output * 1.5)
    model[2].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    model[4].register_full_backward_hook(lambda module, grad_input, grad_output: tuple(g * 2 for g in grad_input))
    model[4].register_full_backward_pre_hook(lambda module, grad_output: tuple(g * 1.1 for g in grad_output))
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[2].weight.register_hook(lambda gradient: gradient * 3)
    return model


def with_a_patched_forward() -> nn.Module:
    model = layers(3)
    original = model[2].forward
    model[2].forward = lambda x: original(x) * 2  # type: ignore[method-assign]
    return model
