"""Hyperparameters and the float32 scalars of a step."""

import math
import struct
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, f32, scalars

VALID: dict[str, Any] = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled": True,
    "bias_correction": True,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1e-3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.5),
        ("beta2", math.nan),
    ],
)
def test_a_hyperparameter_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        AdamHyper(**{**VALID, name: value})


def test_a_group_gives_its_hyperparameters_even_as_tensors() -> None:
    group = {
        "lr": torch.tensor(0.5),
        "betas": (torch.tensor(0.5), 0.25),
        "eps": 1e-8,
        "weight_decay": 0,
        "bias_correction": False,
        "adamw_mode": False,
    }
    expected = AdamHyper(
        lr=0.5, beta1=0.5, beta2=0.25, eps=1e-8, weight_decay=0.0, decoupled=False, bias_correction=False
    )
    assert AdamHyper.of_group(group) == expected


def test_every_scalar_is_exactly_a_float32() -> None:
    for step in (1, 2, 10, 1000, 10**6):
        s = scalars(AdamHyper(**VALID), step, grad_scale=1 / 3)
        for name in ("grad_scale", "decay", "l2", "lerp", "beta2", "grad_sq", "step_size", "bias2_sqrt", "eps"):
            value = getattr(s, name)
            assert struct.unpack("f", struct.pack("f", value))[0] == value


def test_scalars_are_rounded_once_from_float64() -> None:
    s = scalars(AdamHyper(**VALID), 7)
    assert s.decay == f32(1 - 1e-3 * 0.1)
    assert s.step_size == f32(-1e-3 / (1 - 0.9**7))
    assert s.bias2_sqrt == f32(math.sqrt(1 - 0.999**7))
    assert s.grad_sq == f32(1 - 0.999)


def test_without_bias_correction_every_step_has_the_scalars_of_the_limit() -> None:
    plain = AdamHyper(**{**VALID, "bias_correction": False})
    assert replace(scalars(plain, 1), noise=0) == replace(scalars(plain, 1000), noise=0)
    assert scalars(plain, 1).step_size == f32(-1e-3)
    assert scalars(plain, 1).bias2_sqrt == 1.0


def test_each_form_of_decay_leaves_the_other_scalar_neutral() -> None:
    decoupled, l2 = scalars(AdamHyper(**VALID), 1), scalars(AdamHyper(**{**VALID, "decoupled": False}), 1)
    assert (decoupled.decay, decoupled.l2) == (f32(1 - 1e-4), 0.0)
    assert (l2.decay, l2.l2) == (1.0, f32(0.1))


def test_the_lerp_starts_from_the_nearer_end() -> None:
    near_old = scalars(AdamHyper(**{**VALID, "beta1": 0.75}), 1)
    near_grad = scalars(AdamHyper(**{**VALID, "beta1": 0.25}), 1)
    assert (near_old.lerp, near_old.lerp_from_grad) == (0.25, False)
    assert (near_grad.lerp, near_grad.lerp_from_grad) == (-0.25, True)


def test_a_step_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        scalars(AdamHyper(**VALID), 0)


def test_importing_the_optimizer_imports_no_compiler() -> None:
    code = (
        "import sys, gemini.nn.optimizer as o; o.HybridAdam; "
        "print([m for m in ('numba', 'llvmlite', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
