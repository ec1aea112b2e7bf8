"""Parts of a boosted model and its class: converting is refused or changes nothing, its class makes plain models."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, SMALL, Trained, batch, build, check_same
from torch import Tensor, nn

from gemini.boosted import is_boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin

CONVERSIONS: list[Any] = [
    lambda m: m.double(),
    lambda m: m.half(),
    lambda m: m.bfloat16(),
    lambda m: m.to(torch.float64),
    lambda m: m.to("meta"),
    lambda m: m.to(torch.ones(1, dtype=torch.float64)),
    lambda m: m.type(torch.float16),
    lambda m: m.to_empty(device="cpu"),
    lambda m: m.share_memory(),
    lambda m: m._apply(lambda tensor: tensor.clone()),
    lambda m: m._apply(lambda tensor: tensor.mul_(2)),
]
NOTHING: list[Any] = [
    lambda m: m.float(),
    lambda m: m.cpu(),
    lambda m: m.to("cpu"),
    lambda m: m.to(torch.float32),
    lambda m: m.to(device="cpu", dtype=torch.float32, non_blocking=True),
    lambda m: m.to(memory_format=torch.contiguous_format),
    lambda m: m._apply(lambda tensor: tensor),
]
FUTURES = [
    torch.__future__.set_overwrite_module_params_on_conversion,
    torch.__future__.set_swap_module_params_on_conversion,
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("future", [None, *FUTURES], ids=["now", "overwrite", "swap"])
@pytest.mark.parametrize("where", ["resident", "streamed"])
def test_converting_a_part_is_refused_and_what_changes_nothing_is_not(where: str, future: Any) -> None:
    ours, plain = Trained(PLACEMENTS[where]), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    if future is not None:
        future(True)
    try:
        for convert in CONVERSIONS:
            for part in (ours.model[3], ours.model):
                with pytest.raises(RuntimeError, match=r"boosted model.*cannot be moved or converted.*precision="):
                    convert(part)
            with pytest.raises(RuntimeError, match="boosted model"):
                convert(nn.ModuleList([ours.model[12]]))
        for convert in NOTHING:
            for part in (ours.model[3], ours.model):
                assert convert(part) is part
    finally:
        if future is not None:
            future(False)
    for run in (ours, plain):
        torch.manual_seed(8)
        run.step(1)
    check_same(ours, plain)


def test_the_error_names_the_part_and_what_would_change() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    model, *_ = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **SMALL)).boost(Net())
    with pytest.raises(RuntimeError, match=r"^body\.1, a part of a boosted model.*weight \(torch\.float32 on cpu\)"):
        model.body[1].double()
    with pytest.raises(RuntimeError, match=r"^body\.0, a part"):
        model.body[0].to(memory_format=torch.channels_last)
    assert model.body.to(memory_format=torch.contiguous_format) is model.body


def test_parts_without_managed_parameters_and_new_ones_are_converted() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x

    net = nn.Sequential(nn.Linear(3, 3), Scale(), nn.ReLU())
    model, *_ = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False)).boost(net)
    assert model[1].double().scale.dtype is torch.float64
    model.new = nn.Linear(2, 2)
    assert model.new.double().weight.dtype is torch.float64
    assert pickle.loads(pickle.dumps(model[2])).__dict__.keys() >= {"_apply"}
    copied = copy.deepcopy(model[1])
    assert copied.half().scale.dtype is torch.float16
    assert model[1].scale.dtype is torch.float64


MADE: list[type] = []


class Net(nn.Module):
    def __init_subclass__(cls, *, registered: bool, **options: Any) -> None:
        super().__init_subclass__(**options)
        MADE.append(cls)

    def __init__(self, width: int, *, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])

    @classmethod
    def small(cls) -> "Net":
        return cls(4)

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


def test_the_class_of_a_boosted_model_makes_plain_models() -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, host_memory="8MiB"))
    model, *_ = booster.boost(Net(8, depth=3))
    assert not MADE
    assert isinstance(model, Net) and type(model).__name__ == "Net" and type(model).__qualname__ == "Net"
    assert inspect.signature(type(model)) == inspect.signature(Net)
    for make in (lambda: type(model)(4, depth=1), lambda: model.__class__(4), lambda: type(model).small(), model.small):
        second = make()
        assert type(second) is Net and not is_boosted(second)
        third = copy.deepcopy(second).double()
        optimizer: Any = torch.optim.AdamW(second.parameters())
        second(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        torch.save(second.state_dict(), io.BytesIO())
        assert next(third.parameters()).dtype is torch.float64
        second, optimizer, *_ = booster.boost(second, optimizer)
        second(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert torch.isfinite(model(torch.ones(2, 8))).all()


def test_the_class_of_a_boosted_model_is_not_replaced_or_derived_from() -> None:
    model, *_ = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False)).boost(build())
    with pytest.raises(TypeError, match="cannot be replaced by Sequential"):
        model.__class__ = nn.Sequential
    derived = type("Derived", (type(model),), {})
    with pytest.raises(TypeError, match=r"derive it from Sequential of torch\.nn"):
        derived()
    assert torch.isfinite(model(batch(0))).all()
