"""A forward that runs again finds what was around it the first time, or is not run again."""

import contextvars
import decimal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.torch_private import TorchDispatchMode, attention_order, modes

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32
SCALE = contextvars.ContextVar("SCALE", default=1.0)


class DoublesSines(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += func is torch.sin
        return result * 2 if func is torch.sin else result


class DoublesSinesBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.sin.default else result


@contextmanager
def a_variable() -> Iterator[None]:
    token = SCALE.set(3.0)
    yield
    SCALE.reset(token)


@contextmanager
def another(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    yield
    put(before)


def attribute(of: Any, name: str, value: Any) -> AbstractContextManager[None]:
    return another(lambda: getattr(of, name), lambda v: setattr(of, name, v), value)


def deterministic() -> float:
    return 2.0 if torch.are_deterministic_algorithms_enabled() else 1.0


def attended(x: Tensor) -> Tensor:
    return scaled_dot_product_attention(x, x, x)


def counted(x: Tensor) -> Tensor:
    SCALE.set(SCALE.get() + 0.5)
    return x * SCALE.get()


def with_gradients_within(x: Tensor) -> Tensor:
    y = x.sin()
    with torch.enable_grad():
        return x.detach() + y.cos()


AROUND: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[Tensor], Tensor]]] = {
    "a context variable": (a_variable, lambda x: x * SCALE.get()),
    "a context variable that is set within": (a_variable, counted),
    "a decimal context": (lambda: decimal.localcontext(prec=3), lambda x: x * float(decimal.Decimal(1) / 7)),
    "errors of numpy": (lambda: np.errstate(divide="raise"), lambda x: x * len(np.geterr()["divide"])),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), lambda x: (x @ x.t()).sin().float() @ x),
    "no autocast": (lambda: torch.autocast("cpu", enabled=False), lambda x: (x @ x.t()).sin() @ x),
    "a default dtype": (
        lambda: another(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        lambda x: (x * torch.linspace(0, 1, WIDTH)).sin().float(),
    ),
    "deterministic algorithms": (
        lambda: another(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
        lambda x: x * deterministic(),
    ),
    "threads": (
        lambda: another(torch.get_num_threads, torch.set_num_threads, 2),
        lambda x: x * torch.get_num_threads(),
    ),
    "kernels of attention": (lambda: sdpa_kernel(SDPBackend.MATH), attended),
    "an order of kernels of attention": (
        lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True),
        lambda x: x * (1 + attention_order()[0]),
    ),
    "no oneDNN": (
        lambda: attribute(torch.backends.mkldnn, "enabled", False),
        lambda x: x * (2 if torch.backends.mkldnn.enabled else 3),
    ),
    "another precision": (
        lambda: attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda x: (x @ x.t()).sin() @ x,
    ),
    "a seed": (lambda: nullcontext(torch.manual_seed(7)), lambda x: torch.nn.functional.dropout(x, 0.4)),
    "a default device": (
        lambda: torch.device("meta"),
        lambda x: x * (2 if torch.get_default_device().type == "meta" else 3),
    ),
    "no gradients": (torch.no_grad, with_gradients_within),
    "a function mode": (DoublesSines, lambda x: x),
    "a dispatch mode": (DoublesSinesBelow, lambda x: x),
}


class Part(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.run = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), run

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sin(self.run(self.up(x))))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Blocks, the second of which runs within a context."""

    def __init__(self, around: Callable[[], AbstractContextManager[Any]], run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.around, self.blocks = around, nn.ModuleList(Part(run) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        with self.around():
            x = self.blocks[1](x)
        return self.blocks[2](x)  # type: ignore[no-any-return]


def recomputed(model: nn.Module, folder: Path) -> Any:
    plugin = GeminiPlugin(precision="fp32", offload_dir=folder, activation_policy="recompute", telemetry=False)
    return Booster(plugin=plugin).boost(model, HybridAdam(model.parameters(), lr=1e-2))[0]


def gradients(
    model: Any, forward: Callable[[], AbstractContextManager[Any]], backward: Callable[[], AbstractContextManager[Any]]
) -> list[Any]:
    found: list[Any] = []
    for step in range(2):
        torch.manual_seed(step)
        SCALE.set(1.0)
        x = torch.randn(WIDTH, WIDTH)
        with forward():
            loss = model(x).square().sum()
        with backward():
            loss.backward()
        found += [loss.detach(), SCALE.get(), torch.rand(2)]
        found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    return found


def check_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_a_block_in_forward_only(name: str, tmp_path: Path) -> None:
    around, run = AROUND[name]
    expected = gradients(Model(around, run), nullcontext, nullcontext)
    check_same(gradients(recomputed(Model(around, run), tmp_path), nullcontext, nullcontext), expected)
    assert modes() == []


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [name for name in AROUND if name != "no gradients"])
def test_what_is_around_the_whole_forward(name: str, tmp_path: Path) -> None:
    around, run = AROUND[name]
    expected = gradients(Model(nullcontext, run), around, nullcontext)
    check_same(gradients(recomputed(Model(nullcontext, run), tmp_path), around, nullcontext), expected)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [name for name in AROUND if name != "a seed"])
def test_what_is_around_the_backward_only(name: str, tmp_path: Path) -> None:
    around, run = AROUND[name]
    if name == "a dispatch mode":
        around = DoublesSines  # what backward itself computes goes through a dispatch mode in plain torch, too
    expected = gradients(Model(nullcontext, run), nullcontext, around)
    check_same(gradients(recomputed(Model(nullcontext, run), tmp_path), nullcontext, around), expected)
    assert modes() == []


def test_a_block_under_a_mode_is_kept_for_that_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = recomputed(Model(nullcontext, lambda x: x), tmp_path)
    x = torch.randn(2, WIDTH)
    calls = []
    for around in (nullcontext, DoublesSines, nullcontext):
        with around():
            loss = model(x).sum()
        mode = DoublesSines()
        with mode:
            loss.backward()
        calls.append(mode.calls)
    assert calls == [0, 0, 0]
    assert not caplog.records
