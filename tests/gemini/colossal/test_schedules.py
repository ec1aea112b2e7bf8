"""Learning rate schedules: what they come to at each step, for every group."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer, lr_scheduler

from gemini import nn as gemini_nn
from gemini.nn import lr_scheduler as schedules
from gemini.nn.optimizer import HybridAdam

BASES = (0.1, 0.02)
TOTAL = 20


def optimizer() -> Optimizer:
    return HybridAdam([{"params": [nn.Parameter(torch.ones(1))], "lr": base} for base in BASES])


def rates(scheduler: Any, steps: int) -> list[tuple[float, ...]]:
    """The learning rates of now and after each further step."""
    found = []
    for _ in range(steps):
        found.append(tuple(group["lr"] for group in scheduler.optimizer.param_groups))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def cosine(share: float, base: float, lowest: float) -> float:
    return lowest + (base - lowest) * (1 + math.cos(math.pi * share)) / 2


CASES: dict[str, tuple[str, dict[str, Any], Callable[[int, float], float]]] = {
    "linear": ("LinearWarmupLR", {}, lambda t, base: base * (TOTAL - t) / TOTAL),
    "linear with a warm-up": (
        "LinearWarmupLR",
        {"warmup_steps": 4},
        lambda t, base: base * (t + 1) / 5 if t < 4 else base * (TOTAL - t) / 16,
    ),
    "cosine with a warm-up": (
        "CosineAnnealingWarmupLR",
        {"warmup_steps": 4, "eta_min": 0.01},
        lambda t, base: base * (t + 1) / 4 if t < 4 else cosine((t - 4) / 16, base, 0.01),
    ),
    "cosine without one": ("CosineAnnealingWarmupLR", {}, lambda t, base: cosine(t / TOTAL, base, 0.0)),
    "flat, then cosine": (
        "FlatAnnealingLR",
        {"pct_start": 0.5},
        lambda t, base: base if t < 10 else cosine((t - 10) / 10, base, 0.0),
    ),
    "warm-up, flat, cosine": (
        "FlatAnnealingWarmupLR",
        {"warmup_steps": 4, "pct_start": 0.5, "eta_min": 0.01},
        lambda t, base: base * (t + 1) / 4 if t < 4 else base if t < 12 else cosine((t - 12) / 8, base, 0.01),
    ),
    "steps with a warm-up": (
        "MultiStepWarmupLR",
        {"warmup_steps": 4, "milestones": [2, 6, 10]},
        lambda t, base: base * ((t + 1) / 4 if t < 4 else 1 if t < 6 else 0.1 if t < 10 else 0.01),
    ),
    "polynomial": (
        "PolynomialLR",
        {"end_lr": 0.001, "power": 2.0},
        lambda t, base: (base - 0.001) * (1 - t / TOTAL) ** 2 + 0.001,
    ),
    "polynomial with a warm-up": (
        "PolynomialWarmupLR",
        {"warmup_steps": 4, "end_lr": 0.001},
        lambda t, base: base * (t + 1) / 4 if t < 4 else (base - 0.001) * (1 - (t - 4) / 16) + 0.001,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_follows_its_formula(case: str) -> None:
    name, arguments, formula = CASES[case]
    found = rates(getattr(schedules, name)(optimizer(), TOTAL, **arguments), TOTAL + 1)
    assert found == [
        pytest.approx([formula(t, base) for base in BASES], rel=1e-12, abs=1e-15) for t in range(TOTAL + 1)
    ]


@pytest.mark.parametrize("name", ["LinearWarmupLR", "PolynomialLR"])
def test_what_falls_to_an_end_stays_there(name: str) -> None:
    lowest = 0.0 if name == "LinearWarmupLR" else 0.0001
    assert rates(getattr(schedules, name)(optimizer(), TOTAL), TOTAL + 4)[TOTAL:] == [(lowest, lowest)] * 4


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_goes_on_from_its_state_and_from_a_step(case: str) -> None:
    name, arguments, _ = CASES[case]
    make = getattr(schedules, name)
    straight = rates(make(optimizer(), TOTAL, **arguments), 12)
    first = make(optimizer(), TOTAL, **arguments)
    assert rates(first, 7) == straight[:7]

    loaded = make(optimizer(), TOTAL, **arguments)
    loaded.load_state_dict(first.state_dict())
    loaded.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates(loaded, 5) == straight[7:]

    later = optimizer()
    for group, base in zip(later.param_groups, BASES, strict=True):
        group["initial_lr"] = base
    assert rates(make(later, TOTAL, **arguments, last_epoch=6), 5) == straight[7:]


TORCHS: dict[str, tuple[dict[str, Any], Callable[[Optimizer], Any]]] = {
    "CosineAnnealingLR": ({"eta_min": 0.01}, lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.01)),
    "OneCycleLR": (
        {"pct_start": 0.5, "div_factor": 10.0},
        lambda o: lr_scheduler.OneCycleLR(o, list(BASES), total_steps=TOTAL, pct_start=0.5, div_factor=10.0),
    ),
    "MultiStepLR": ({"milestones": [5, 10]}, lambda o: lr_scheduler.MultiStepLR(o, [5, 10])),
    "StepLR": ({"step_size": 3, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 3, 0.5)),
    "ExponentialLR": ({"gamma": 0.9}, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "LambdaLR": ({"lr_lambda": lambda t: 0.9**t}, lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t)),
    "MultiplicativeLR": ({"lr_lambda": lambda t: 0.9}, lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9)),
}


@pytest.mark.parametrize("name", TORCHS)
def test_the_others_are_torchs_under_colossalais_arguments(name: str) -> None:
    arguments, torchs = TORCHS[name]
    ours = getattr(schedules, name)(optimizer(), TOTAL, **arguments)
    assert rates(ours, TOTAL) == rates(torchs(optimizer()), TOTAL)
    assert isinstance(ours, getattr(lr_scheduler, name))


def test_one_cycle_also_moves_the_momentum_of_adam() -> None:
    cycled = optimizer()
    schedules.OneCycleLR(cycled, TOTAL)
    assert [group["betas"][0] for group in cycled.param_groups] == [0.95, 0.95]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("CosineAnnealingWarmupLR", {"warmup_steps": 21}, "from 0 to total_steps, 20, got 21"),
        ("PolynomialWarmupLR", {"warmup_steps": -1}, "from 0 to total_steps, 20, got -1"),
        ("FlatAnnealingLR", {"pct_start": 1.5}, "pct_start must be from 0 to 1, got 1.5"),
        ("PolynomialLR", {"end_lr": -0.1}, "end_lr must be 0 or more, got -0.1"),
        ("MultiStepLR", {}, "milestones must be the steps"),
        ("MultiStepWarmupLR", {"milestones": []}, "milestones must be the steps"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        getattr(schedules, name)(optimizer(), TOTAL, **arguments)


@pytest.mark.parametrize("name", ["CosineAnnealingWarmupLR", "PolynomialWarmupLR", "FlatAnnealingWarmupLR"])
def test_a_warm_up_may_take_all_steps(name: str) -> None:
    found = rates(getattr(schedules, name)(optimizer(), 4, warmup_steps=4), 5)
    assert found[:4] == [tuple(base * (t + 1) / 4 for base in BASES) for t in range(4)]
    assert found[4] == pytest.approx(BASES)


def test_a_schedule_may_stay_flat_to_its_end() -> None:
    assert rates(schedules.FlatAnnealingLR(optimizer(), 4, pct_start=1.0), 5) == [BASES] * 5


def test_schedules_steer_other_optimizers_too() -> None:
    plain = AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    schedules.LinearWarmupLR(plain, 4, warmup_steps=1)
    assert plain.param_groups[0]["lr"] == 0.05


def test_schedules_and_optimizers_are_in_nn_as_well() -> None:
    assert {*schedules.__all__, "HybridAdam", "CPUAdam", "FusedAdam"} <= set(dir(gemini_nn))
    assert gemini_nn.LinearWarmupLR is schedules.LinearWarmupLR
    assert gemini_nn.FusedAdam is gemini_nn.CPUAdam is HybridAdam
