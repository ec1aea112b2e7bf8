"""The hint about float32 tensors that are made in the forward of a model in half precision."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin


class Says(nn.Module):
    """A linear layer, and what ``then`` makes of its output."""

    scale: Tensor

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.softmax = nn.Softmax(-1)
        self.register_buffer("scale", torch.ones(8))
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.linear(x))


def hints(model: nn.Module, *given: Any, precision: str = "bf16", calls: int = 1) -> list[warnings.WarningMessage]:
    """Those of the first forwards of a boosted model."""
    model = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False)).boost(model)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            model(*given)
    return [each for each in caught if "here a float32 tensor meets" in str(each.message)]


PROMOTED: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": lambda x: x * torch.ones(8),
    "reversed": lambda x: torch.ones(8) * x,
    "positions": lambda x: x + torch.arange(8).float(),
    "mask": lambda x: x * torch.tensor([True] * 4 + [False] * 4).float(),
    "views": lambda x: (x.unsqueeze(0) * torch.ones(8)[None]).squeeze(0).relu(),
    "in a list": lambda x: torch.cat([x, torch.zeros(4, 8)]),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(8)),
    "added to itself": lambda x: (x * torch.ones(8)).add_(1) + x,
}
MEANT: dict[str, Callable[[Tensor], Tensor]] = {
    "its dtype": lambda x: x * torch.ones(8, dtype=x.dtype),
    "converted": lambda x: x.float() * torch.ones(8),
    "converted, and what meets it": lambda x: x.float().softmax(-1) * x,
    "there and back": lambda x: (x * torch.ones(8)).to(x.dtype),
    "a number": lambda x: x * 2.0 * torch.tensor(3.0),
    "into what is there": lambda x: x.mul_(torch.ones(8)),
    "integers": lambda x: x + torch.arange(8),
    "softmax in float32": lambda x: torch.softmax(x, -1, dtype=torch.float32),
}


@pytest.mark.parametrize("name", PROMOTED)
def test_what_is_made_in_float32_is_told_with_its_line(name: str) -> None:
    (hint,) = hints(Says(PROMOTED[name]), torch.randn(4, 8))
    assert "bfloat16" in str(hint.message) and "Says" in str(hint.message)
    lines = Path(hint.filename).read_text().splitlines()
    assert Path(hint.filename) == Path(__file__) and f'"{name}":' in lines[hint.lineno - 1]


@pytest.mark.parametrize("name", MEANT)
def test_what_is_meant_is_left_alone(name: str) -> None:
    assert not hints(Says(MEANT[name]), torch.randn(4, 8))


def test_a_buffer_is_told_unless_it_is_converted() -> None:
    kept, converted = Says(lambda x: x), Says(lambda x: x)
    kept.then = lambda x: x * kept.scale
    converted.then = lambda x: x * converted.scale.to(x.dtype)
    assert hints(kept, torch.randn(4, 8))
    assert not hints(converted, torch.randn(4, 8))


def test_float32_between_two_modules_that_comes_back() -> None:
    model = Says(lambda x: x)
    model.then = lambda x: model.softmax(x + torch.zeros(8)).to(x.dtype)
    assert not hints(model, torch.randn(4, 8))


def test_the_module_that_makes_it_is_named_where_it_returns() -> None:
    inner = Says(PROMOTED["ones"])
    (hint,) = hints(nn.Sequential(nn.Linear(8, 8), inner), torch.randn(4, 8))
    assert "Says" in str(hint.message)


@dataclass
class Output:
    hidden: Tensor


def test_it_is_found_in_what_outputs_hold() -> None:
    held = Says(PROMOTED["ones"])
    held.then = lambda x: Output(x * torch.ones(8))  # type: ignore[assignment, return-value]
    assert hints(held, torch.randn(4, 8))


def test_other_precisions_and_later_forwards_have_no_hint() -> None:
    assert not hints(Says(PROMOTED["ones"]), torch.randn(4, 8), precision="fp32")
    assert "float16" in str(hints(Says(PROMOTED["ones"]), torch.randn(4, 8), precision="fp16")[0].message)
    assert len(hints(Says(PROMOTED["ones"]), torch.randn(4, 8), calls=3)) == 1
