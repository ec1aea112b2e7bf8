"""What reaches the moments: clipping, loss scale, accumulation and dtypes, against the reference in plain torch.

An Adam step has the size of the learning rate whatever the gradient's, so weights alone would not notice a gradient
that was not clipped or not unscaled. The moments do, and they are compared bit for bit.
"""

import itertools
from typing import Any

import pytest
import torch
from parity import masters
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.kernels.reference import BY_FORM
from gemini.nn.optimizer.rules import adam_rule
from gemini.updates import scaling

STEPS = 3
MAX_NORM = 0.05
SCALE = 2.0**8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HYPER = AdamHyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, decoupled=True, bias_correction=True)
CASES = [
    case
    for case in itertools.product(DTYPES, (False, True), (1.0, SCALE), (1, 3))
    if (case[2] == 1.0) or case[0] == "fp16"
]

Moments = dict[str, list[Tensor]]


def build(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 16))
    for parameter in model.parameters():  # masters start equal on both sides
        parameter.data = parameter.data.to(dtype).float()
    return model


def loss_of(model: nn.Module, number: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return model(torch.randn(4, 32, generator=generator).to(dtype)).float().square().mean()


def expected(precision: str, clips: bool, scale: float, accumulate: int) -> Moments:
    """Nothing of ours but the reference's arithmetic."""
    dtype = DTYPES[precision]
    model = build(dtype)
    state = {n: [p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)] for n, p in model.named_parameters()}
    model.to(dtype)
    for step in range(1, STEPS + 1):
        for i in range(accumulate):
            (loss_of(model, 10 * step + i, dtype) * scale).backward()
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters()]
        norm = torch.linalg.vector_norm(torch.stack(norms)) / scale
        coefficient = float((MAX_NORM / (norm + 1e-6)).clamp(max=1.0)) if clips else 1.0
        assert coefficient < 1.0 or not clips  # or nothing would be tested
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            flat = [tensor.view(-1) for tensor in state[name]]
            at_step = scalars(HYPER, step, coefficient / scale)
            BY_FORM["fp32"](flat[:3], parameter.grad.view(-1), at_step)
            parameter.data = state[name][0].to(dtype)
            parameter.grad = None
    return state


def managed(precision: str, clips: bool, scale: float, accumulate: int, **plugin: Any) -> Moments:
    model = build(DTYPES[precision])
    names = [name for name, _ in model.named_parameters()]
    options = {"max_norm": MAX_NORM} if clips else {}
    if precision == "fp16":
        options |= {"initial_scale": scale, "min_scale": 1.0}
    booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **options, **plugin))
    optimizer = HybridAdam(model.parameters(), lr=HYPER.lr, betas=(0.9, 0.99), weight_decay=0.1)
    model, optimizer, *_ = booster.boost(model, optimizer)
    for step in range(1, STEPS + 1):
        for i in range(accumulate):
            booster.backward(loss_of(model, 10 * step + i, DTYPES[precision]), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert model.memory_stats()["step/skipped_count"] == 0
    states, weights = optimizer.state_dict()["state"], masters(model)
    return {n: [weights[n], states[i]["exp_avg"], states[i]["exp_avg_sq"]] for i, n in enumerate(names)}


def different(a: Moments, b: Moments) -> list[tuple[str, int]]:
    return [(name, i) for name in a for i in range(3) if not torch.equal(a[name][i], b[name][i])]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("precision", "clips", "scale", "accumulate"), CASES)
def test_masters_and_moments_after_three_steps_are_those_of_the_reference(
    precision: str, clips: bool, scale: float, accumulate: int
) -> None:
    assert different(managed(precision, clips, scale, accumulate), expected(precision, clips, scale, accumulate)) == []


@pytest.mark.parametrize("precision", DTYPES)
def test_on_a_small_device_too(precision: str) -> None:
    scale = SCALE if precision == "fp16" else 1.0
    small = {"device_memory": "16KiB", "chunk_config_dict": {1: {"chunk_size": 1024}}}
    assert different(managed(precision, True, scale, 3, **small), expected(precision, True, scale, 3)) == []


@pytest.mark.parametrize("mutation", ["no clip", "no unscaling", "bias correction", "clip before unscaling"])
def test_these_tests_notice_a_wrong_gradient(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = expected("fp16", True, SCALE, 1)
    if mutation == "no clip":
        monkeypatch.setattr(scaling, "clip_coefficient", lambda norm, max_norm: 1.0)
    elif mutation == "no unscaling":
        monkeypatch.setattr(scaling.Scaling, "scale", 1.0)
    elif mutation == "bias correction":
        monkeypatch.setattr(adam_rule, "scalars", lambda hyper, step, scale: scalars(hyper, step + 1, scale))
    else:
        norm = scaling.total_norm
        monkeypatch.setattr(scaling, "total_norm", lambda *args: norm(*args) * SCALE)
    wrong = different(managed("fp16", True, SCALE, 1), right)
    # The bias correction is not in the moments: it shows in the masters, and through them in later gradients.
    assert {i for _, i in wrong} == {0, 1, 2}
