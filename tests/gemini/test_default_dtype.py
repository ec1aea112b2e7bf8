"""torch's default dtype and device are the user's: nothing of ours depends on them, whenever they change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from loop import PLACEMENTS
from torch import Tensor, nn

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam

STEPS = 3
STAGES = ("build", "boost", "train")
Placement = dict[str, Any] | None
KINDS: dict[str, Callable[[Any], Any]] = {
    "HybridAdam": lambda p: HybridAdam(p, lr=1e-2, weight_decay=0.1),
    "states in bf16": lambda p: HybridAdam(p, lr=1e-2, states="bf16"),
    "states in 8 bits": lambda p: HybridAdam(p, lr=1e-2, states="8bit"),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
}


@contextmanager
def defaults(dtype: torch.dtype | None, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def build() -> nn.Module:
    torch.manual_seed(0)
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    layers = [m for _ in range(5) for m in (nn.Linear(64, 64, **plain), nn.GELU())]
    return nn.Sequential(*layers, nn.LayerNorm(64, **plain), nn.Linear(64, 8, **plain))


def run(
    placement: Placement, stage: str, kind: str, dtype: torch.dtype | None, device: str | None = None, **plugin: Any
) -> tuple[list[float], dict[str, Tensor]]:
    def at(now: str) -> Any:
        return defaults(dtype, device) if now == stage else defaults(None, None)

    with at("build"):
        model: Any = build()
        optimizer: Any = KINDS[kind](model.parameters())
    if placement is not None:
        with at("boost"):
            boosting = GeminiPlugin(precision="fp32", telemetry=False, max_norm=1.0, **placement, **plugin)
            model, optimizer, *_ = Booster(plugin=boosting).boost(model, optimizer)
    losses = []
    with at("train"):
        for step in range(STEPS):
            batch = torch.full((4, 64), step + 0.5, dtype=torch.float32, device="cpu")
            loss = model(batch).square().mean() * 100.0
            loss.backward()
            if placement is None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        states = optimizer.state_dict()["state"]
    found = {name: value.detach().clone() for name, value in gemini.named_tensors(model)} if placement else {
        name: value.detach().clone() for name, value in model.named_parameters()
    }  # fmt: skip
    found |= {f"{i}.{name}": value for i, s in states.items() for name, value in s.items() if isinstance(value, Tensor)}
    return losses, found


def check_same(ours: tuple[list[float], dict[str, Tensor]], plain: tuple[list[float], dict[str, Tensor]]) -> None:
    assert ours[0] == plain[0]
    assert ours[1].keys() == plain[1].keys()
    assert not [name for name, value in ours[1].items() if not torch.equal(value, plain[1][name])]
    assert not [name for name, value in ours[1].items() if value.dtype is not torch.float32]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_depend_on_the_default_dtype(kind: str, tmp_path: Any) -> None:
    expected = run(None, "", kind, None)
    for dtype in (torch.bfloat16, torch.float64):
        for stage in STAGES:
            for name, placement in PLACEMENTS.items():
                where = {**placement, "offload_dir": tmp_path} if name == "disk" else placement
                if kind == "HybridAdam" or (name == "streamed" and stage != "build"):
                    check_same(run(where, stage, kind, dtype), expected)
    if kind.startswith(("HybridAdam", "states")):
        check_same(run(None, "train", kind, torch.bfloat16), expected)
    check_same(run(PLACEMENTS["streamed"], "boost", kind, torch.float16), expected)


@pytest.mark.parametrize("stage", ["boost", "train"])
def test_training_does_not_depend_on_the_default_device(stage: str, tmp_path: Any) -> None:
    device = "meta" if stage == "train" else "cpu"  # boost itself refuses meta
    for kind in ("HybridAdam", "states in 8 bits", "SGD"):
        expected = run(None, "", kind, None)
        check_same(run({**PLACEMENTS["disk"], "offload_dir": tmp_path}, stage, kind, None, device), expected)


def test_saving_and_loading_do_not_depend_on_the_default_dtype(tmp_path: Any) -> None:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **PLACEMENTS["streamed"]))
    model: Any = build()
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    with defaults(torch.bfloat16, "meta"):
        booster.save_model(model, tmp_path / "model")
        booster.save_optimizer(optimizer, tmp_path / "optimizer")
    expected = dict(gemini.named_tensors(model))
    states = optimizer.state_dict()["state"]
    optimizer.step()
    with defaults(torch.bfloat16, "meta"):
        booster.load_model(model, tmp_path / "model")
        booster.load_optimizer(optimizer, tmp_path / "optimizer")
    assert all(torch.equal(value, expected[name]) for name, value in gemini.named_tensors(model))
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states[index][name]) for name, value in state.items())


def test_lazy_models_have_the_dtype_of_the_default_in_which_they_were_built() -> None:
    def build_it() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))

    for dtype in (torch.bfloat16, torch.float64):
        with defaults(dtype, None):
            eager = build_it()
            with LazyInitContext():
                lazy = build_it()
        LazyInitContext.materialize(lazy)
        for ours, theirs in zip(lazy.state_dict().values(), eager.state_dict().values(), strict=True):
            assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)
        with LazyInitContext():
            later = build_it()
        with defaults(dtype, "meta"):
            LazyInitContext.materialize(later)
        for ours, theirs in zip(later.state_dict().values(), build_it().state_dict().values(), strict=True):
            assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)
