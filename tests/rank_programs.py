"""What ranks do in tests: lists of operations, equal or not, and what one process comes to that does the same."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import RankError
from gemini.nn.optimizer import HybridAdam

WIDTH = 16
LAYERS = 4
SMALL_CHUNKS = {1: {"chunk_size": 512}}


class Injected(Exception):
    """What the user's own code raises."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Net(nn.Module):
    """Layers, of which a call may skip one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3)
        self.skipped: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index != self.skipped:
                x = layer(x)
        return self.head(x)


class Fails(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise Injected("in backward")


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(number: int, rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(number))


class Training:
    """A boosted model, and what may be done to it and go wrong."""

    def __init__(self, rank: int = 0, ranks: int = 1, lr: float = 1e-2, **plugin: Any) -> None:
        self.rank, self.ranks = rank, ranks
        self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **plugin))
        model = build()
        optimizer = HybridAdam(model.parameters(), lr=lr, weight_decay=0.1)
        boosted: Any = self.booster.boost(model, optimizer)
        self.model, self.optimizer = boosted[0], boosted[1]
        self.backwards = 0
        self.loss: Tensor | None = None
        self.losses: list[float] = []

    # -- what training does

    def forward(self, rows: int = 3, skipped: int | None = None) -> None:
        self.loss = self.compute(self.backwards * self.ranks + self.rank, rows, skipped)

    def compute(self, number: int, rows: int = 3, skipped: int | None = None) -> Tensor:
        self.model.skipped = skipped
        return self.model(batch(number, rows)).square().mean()  # type: ignore[no-any-return]

    def backward(self) -> None:
        if self.loss is None:
            self.forward()
        assert self.loss is not None
        loss, self.loss = self.loss, None
        self.backwards += 1
        self.booster.backward(loss, self.optimizer)
        self.losses.append(loss.item())

    def accumulate(self, number: int, forward: str) -> None:
        self.booster.backward(self.compute(number, **arguments(forward)), self.optimizer)

    def step(self) -> None:
        self.loss = None  # of weights that are about to change
        self.optimizer.step()

    def zero(self) -> None:
        self.optimizer.zero_grad()

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.forward()
            self.backward()
            self.step()
            self.zero()

    def clip(self) -> None:
        self.optimizer.clip_grad_by_norm(0.01)

    def edit(self) -> None:
        self.loss = None
        with torch.no_grad():
            self.model.head.weight.mul_(0.5)

    # -- what looks at it

    def read(self) -> None:
        assert all(torch.isfinite(parameter.sum()) for parameter in self.model.parameters())

    def show(self) -> None:
        assert "nan" not in str(self.model.head.weight)

    def state(self) -> None:
        assert len(self.model.state_dict()) == 2 * LAYERS + 2

    def optimizer_state(self) -> None:
        assert len(self.optimizer.state_dict()["param_groups"]) == 1

    def evaluate(self) -> None:
        with torch.no_grad():
            assert torch.isfinite(self.model(batch(1000)).sum())

    def gradient(self) -> None:
        assert self.model.head.weight.grad is None or torch.isfinite(self.model.head.weight.grad.sum())

    def save(self) -> None:
        self.booster.save_model(self.model, "saved.safetensors")

    # -- what goes wrong

    def fail_in_forward(self) -> None:
        with raising(self.model.layers[2].register_forward_pre_hook), suppress(Injected):
            self.forward()

    def fail_in_backward(self) -> None:
        loss = Fails.apply(self.compute(1001))
        with suppress(Injected):
            self.booster.backward(loss, self.optimizer)

    def fail_within_backward(self) -> None:
        """When some gradients have gone to their owners."""
        with raising(self.model.layers[0].register_full_backward_hook), suppress(Injected):
            self.booster.backward(self.compute(1002), self.optimizer)

    def fail_in_gradient_hook(self) -> None:
        with raising(self.model.layers[1].inner.weight.register_hook), suppress(Injected):
            self.booster.backward(self.compute(1003), self.optimizer)

    def fail_before_step(self) -> None:
        with raising(self.optimizer.register_step_pre_hook), suppress(Injected):
            self.optimizer.step()

    # -- how it ends

    def kill_in_forward(self) -> None:
        self.model.layers[2].register_forward_pre_hook(lambda *_: kill())
        self.forward()

    def kill_in_backward(self) -> None:
        self.model.layers[1].inner.weight.register_hook(lambda _: kill())
        self.backward()

    def kill_in_step(self) -> None:
        """When all have agreed on it."""
        boosted(self.model).step.scaling.stepped = kill  # type: ignore[method-assign]
        self.step()

    def kill_in_save(self) -> None:
        timer = threading.Timer(0.002, kill)
        timer.start()
        for _ in range(1000):
            self.save()

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def leave(self) -> None:
        sys.exit(3)

    def leave_at_once(self) -> None:
        os._exit(4)

    def raise_error(self) -> None:
        raise Injected("in the middle")

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    def destroy(self) -> None:
        dist.destroy_process_group()

    def nap(self) -> None:
        time.sleep(1.0)

    def barrier(self) -> None:
        dist.barrier()

    def allreduce(self) -> None:
        ones = torch.ones(4)
        dist.all_reduce(ones)
        assert ones[0] == dist.get_world_size()

    def read_in_thread(self) -> None:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(self.read) for _ in range(4)]:
                done.result()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def arguments(operation: str) -> dict[str, int]:
    """Those that follow its name."""
    return {name: int(value) for name, value in (word.split("=") for word in operation.split()[1:])}


@contextmanager
def raising(register: Callable[..., Any]) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise Injected("in a hook")

    handle = register(fail)
    try:
        yield
    finally:
        handle.remove()


def run_operations(
    rank: int, programs: Sequence[Sequence[str]], goes_on: bool = False, **plugin: Any
) -> dict[str, Any]:
    """The operations of this rank's program. After a `RankError` it ends, or goes on."""
    training = Training(rank, len(programs), **plugin)
    errors: list[tuple[int, str]] = []
    for number, operation in enumerate(programs[rank]):
        try:
            getattr(training, operation.split()[0])(**arguments(operation))
        except RankError as error:
            errors.append((number, str(error)))
            if not goes_on:
                break
    weights = None
    if not errors or goes_on:
        try:
            weights = training.weights()
        except RankError as error:
            errors.append((len(programs[rank]), str(error)))
    return {"errors": errors, "weights": weights, "losses": training.losses}


def run_uncaught(rank: int, programs: Sequence[Sequence[str]]) -> None:
    """The operations of this rank's program; an error ends it, as it ends a script."""
    training = Training(rank, len(programs))
    for operation in programs[rank]:
        getattr(training, operation.split()[0])(**arguments(operation))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def batches_of_a_loader(rank: int) -> list[list[int]]:
    """What the plugin deals out to this rank of ten numbers."""
    loader = GeminiPlugin(telemetry=False).prepare_dataloader(list(range(10)), 2, shuffle=True)
    return [batch.tolist() for batch in loader]
