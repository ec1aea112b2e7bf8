"""What a program changes behind autograd's back after it was saved: backward sees it as in plain PyTorch, or raises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.one_in(6), pytest.mark.usefixtures("one_thread")]

WIDTH = 64
HELD: list[Tensor] = []


def other_data(h: Tensor) -> None:
    h.data = h.data * 2


def other_data_of_other_values(h: Tensor) -> None:
    h.data = torch.linspace(0, 1, h.numel()).view(h.shape)


def other_data_twice(h: Tensor) -> None:
    h.data = h.data * 2
    h.data = h.data + 1


def other_data_and_back(h: Tensor) -> None:
    old = h.data
    h.data = old * 2
    h.data = old


def other_data_of_another_shape(h: Tensor) -> None:
    h.data = torch.ones(3, 5)


def other_strides(h: Tensor) -> None:
    h.data = h.data.flip(0).t().contiguous().t()


def data_in_place(h: Tensor) -> None:
    h.data.mul_(2)


def data_in_place_with_out(h: Tensor) -> None:
    torch.mul(h.data, 2, out=h.data)


def data_by_foreach(h: Tensor) -> None:
    torch._foreach_mul_([h.data], 2)


def data_through_numpy(h: Tensor) -> None:
    h.detach().numpy()[:] += 1


def data_through_dlpack(h: Tensor) -> None:
    torch.from_dlpack(h.detach()).mul_(2)


def through_the_storage(h: Tensor) -> None:
    h.untyped_storage().fill_(1)


def storage_of_another_size(h: Tensor) -> None:
    h.untyped_storage().resize_(2 * h.untyped_storage().nbytes())
    h.data.mul_(2)


def data_of_a_set(h: Tensor) -> None:
    h.data.set_(h.data * 2)  # type: ignore[call-overload]


def data_resized(h: Tensor) -> None:
    h.data.resize_(2).mul_(3)


def in_place(h: Tensor) -> None:
    with torch.no_grad():
        h.mul_(2)


def by_foreach(h: Tensor) -> None:
    with torch.no_grad():
        torch._foreach_mul_([h], 2)


def detached_in_place(h: Tensor) -> None:
    h.detach().mul_(2)


def a_set(h: Tensor) -> None:
    with torch.no_grad():
        h.set_(h.data * 2)  # type: ignore[call-overload]


def a_transposition(h: Tensor) -> None:
    with torch.no_grad():
        h.t_()


def nothing(h: Tensor) -> None:
    pass


CHANGES = [
    nothing, other_data, other_data_of_other_values, other_data_twice, other_data_and_back, other_data_of_another_shape,
    other_strides, data_in_place, data_in_place_with_out, data_by_foreach, data_through_numpy, data_through_dlpack,
    through_the_storage, storage_of_another_size, data_of_a_set, data_resized, in_place, by_foreach, detached_in_place,
    a_set, a_transposition,
]  # fmt: skip


def an_input(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    y = h.sin()
    change(h)
    return y.cos()


def an_input_of_two(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    y = h.sin() * 3
    change(h)
    return y * h.detach().mean() + y.cos()


def an_input_that_is_held(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    HELD.append(h)
    return an_input(h, change)


def a_result(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    y = h.exp()
    z = y * 3
    change(y)
    return z.cos()


def a_result_and_an_input(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    y = h.exp()
    z = y.sin()
    change(y)
    return z.cos()


def a_view(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    v = h[:, ::2]
    y = v.sin()
    change(v)
    return y.cos()


def what_a_view_is_of(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    v = h.t()
    y = v.sin()
    change(h)
    return y.cos()


def one_of_two_views(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    a, b = h.chunk(2)
    y = a.sin() * b.cos()
    change(b)
    return y.cos()


class Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        ctx.save_for_backward(x, y)
        return y, x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, other: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return gradient * y + other * x.cos()


def an_input_of_a_function(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    y, z = Saves.apply(h)
    change(h)
    return (y * 0.1 + z).cos()  # type: ignore[no-any-return]


def a_result_of_a_function(h: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    y, z = Saves.apply(h)
    w = y * 0.1 + z
    change(y)
    return w.cos()  # type: ignore[no-any-return]


WHERE = [
    an_input, an_input_of_two, an_input_that_is_held, a_result, a_result_and_an_input, a_view, what_a_view_is_of,
    one_of_two_views, an_input_of_a_function, a_result_of_a_function,
]  # fmt: skip


class Part(nn.Module):
    """A block of which a saved tensor is changed, right after it was saved or when the model's forward is over."""

    def __init__(self, where: Any, change: Any) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.where, self.change = where, change

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.where(self.up(x), self.change))  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, where: Any, change: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Part(where, change) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) / 2 if x.shape[-1] == WIDTH else x
        return x


def outcome(model: Any, steps: int = 2, after: Callable[[], None] | None = None) -> list[Any]:
    """Gradients of some steps, or the kind of the error."""
    found: list[Any] = []
    for step in range(steps):
        HELD.clear()
        x = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(step))
        try:
            loss = model(x).square().sum()
            if after is not None:
                after()
            loss.backward()
        except RuntimeError as error:
            found.append(type(error))
        else:
            found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    return found


def with_policy(policy: str, model: nn.Module, folder: Path) -> Any:
    plugin = GeminiPlugin(precision="fp32", offload_dir=folder, activation_policy=policy, telemetry=False)
    return Booster(plugin=plugin).boost(model, HybridAdam(model.parameters(), lr=1e-2))[0]


def same(found: list[Any], expected: list[Any]) -> bool:
    return all(
        one is other if isinstance(one, type) or isinstance(other, type) else all(map(torch.equal, one, other))
        for one, other in zip(found, expected, strict=True)
    )


def view_widths(where: Any) -> bool:
    return where in (a_view, one_of_two_views)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("policy", ["offload", "recompute", "auto"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_forward_has_the_effect_that_it_has_in_plain_torch(
    change: Any, where: Any, policy: str, tmp_path: Path
) -> None:
    run = (lambda h, change: _widened(where(h, change), h)) if view_widths(where) else where
    expected = outcome(Model(run, change))
    model = with_policy(policy, Model(run, change), tmp_path)
    found = outcome(model)
    assert same(found, expected)


def _widened(y: Tensor, h: Tensor) -> Tensor:
    return torch.cat([y, y], dim=1 if y.shape[1] < WIDTH else 0)
