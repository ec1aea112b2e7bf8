"""HybridAdam on its own: the numbers of torch's fused optimizers."""

import itertools
from typing import Any

import pytest
import torch
from adam_cases import adam_reference, give_gradients, pair
from adam_cases import hyper as make_hyper
from torch import Tensor, nn

from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.kernels.arithmetic import scalars

STEPS = 12
SETTINGS: list[dict[str, Any]] = [
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8},
    {"lr": 3e-2, "betas": (0.95, 0.98), "eps": 1e-6},
    {"lr": 1e-2, "betas": (0.5, 0.5), "eps": 1e-8},
    {"lr": 1.0, "betas": (0.3, 0.9), "eps": 0.0},
    {"lr": 1e-3, "betas": (0.0, 0.0), "eps": 1e-12},
    {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8},
]


def check_same(ours: HybridAdam, theirs: torch.optim.Optimizer, a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[a][name], theirs.state[b][name]), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_float32_training_equals_torch_fused_bit_for_bit(
    setting: dict[str, Any], weight_decay: float, adamw_mode: bool
) -> None:
    twin = torch.optim.AdamW if adamw_mode else torch.optim.Adam
    for numel in (16, 16 * 1001):
        a, b = pair(numel)
        ours = HybridAdam([a], weight_decay=weight_decay, adamw_mode=adamw_mode, **setting)
        theirs = twin([b], weight_decay=weight_decay, fused=True, **setting)
        for step in range(STEPS):
            if step == 5:
                ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = setting["lr"] / 3
            give_gradients((a, b), step)
            ours.step()
            theirs.step()
        check_same(ours, theirs, a, b)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("numel", [1 << 20, 16 * 100_003, 16 * 1_000_003])
def test_large_tensors_equal_torch_fused_however_torch_splits_them(numel: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = pair(numel)
        ours, theirs = HybridAdam([a], weight_decay=0.1), torch.optim.AdamW([b], weight_decay=0.1, fused=True)
        for step in range(3):
            give_gradients((a, b), step)
            ours.step()
            theirs.step()
        check_same(ours, theirs, a, b)
    finally:
        torch.set_num_threads(before)


def test_torch_fused_may_differ_only_in_the_last_elements_after_a_multiple_of_16() -> None:
    numel = 16 * 50 + 15
    a, b = pair(numel)
    ours, theirs = HybridAdam([a], weight_decay=0.1), torch.optim.AdamW([b], weight_decay=0.1, fused=True)
    for step in range(STEPS):
        give_gradients((a, b), step)
        ours.step()
        theirs.step()
    for x, y in [(a, b)] + [(ours.state[a][n], theirs.state[b][n]) for n in ("exp_avg", "exp_avg_sq")]:
        assert torch.equal(x[: 16 * 50], y[: 16 * 50])
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adamw_mode", [True, False])
def test_without_bias_correction_it_equals_the_reference(adamw_mode: bool) -> None:
    a, b = pair(1003)
    optimizer = HybridAdam([a], weight_decay=0.1, bias_correction=False, adamw_mode=adamw_mode)
    h = make_hyper(weight_decay=0.1, bias_correction=False, decoupled=adamw_mode)
    expected = [b.detach(), torch.zeros(1003), torch.zeros(1003)]
    for step in range(STEPS):
        give_gradients((a, b), step)
        optimizer.step()
        adam_reference(expected[:3], b.grad, scalars(h, step + 1))
    assert torch.equal(a, expected[0])
    assert torch.equal(optimizer.state[a]["exp_avg_sq"], expected[2])


@pytest.mark.parametrize("adamw_mode", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float64_training_equals_torch_bit_for_bit(adamw_mode: bool, weight_decay: float) -> None:
    twin = torch.optim.AdamW if adamw_mode else torch.optim.Adam
    a, b = (nn.Parameter(p.detach().double().view(-1, 7)) for p in pair(7 * 31))
    ours = HybridAdam([a], weight_decay=weight_decay, adamw_mode=adamw_mode)
    theirs = twin([b], weight_decay=weight_decay, foreach=False)
    for step in range(STEPS):
        give_gradients((a, b), step)
        ours.step()
        theirs.step()
    check_same(ours, theirs, a, b)
    assert ours.state[a]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_the_rounded_float32_master(dtype: torch.dtype) -> None:
    start = pair(1003)[0].detach().to(dtype)
    param, master = nn.Parameter(start.clone()), nn.Parameter(start.float())
    low, full = HybridAdam([param], weight_decay=0.1), HybridAdam([master], weight_decay=0.1)
    for step in range(STEPS):
        give_gradients((param,), step)
        master.grad = param.grad.float()
        low.step()
        full.step()
        assert torch.equal(param, master.to(dtype))
        assert torch.equal(low.state[param]["master"], master)
    assert low.state[param]["exp_avg"].dtype == torch.float32
    assert "master" not in full.state[master]


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "with gaps": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "reversed dims with gaps": lambda t: torch.cat([t.permute(3, 2, 1, 0)] * 2, dim=-1)[..., :8].permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", [None, *LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_memory_layout_of_parameter_and_gradient_gives_the_same_numbers(
    param_layout: str, grad_layout: str | None, dtype: torch.dtype
) -> None:
    values = torch.randn(8, 3, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, param = nn.Parameter(values.clone()), nn.Parameter(LAYOUTS[param_layout](values))
    assert not param.is_contiguous() or param_layout == "contiguous"
    a, b = HybridAdam([plain], weight_decay=0.1), HybridAdam([param], weight_decay=0.1)
    stride, storage = param.stride(), param.data_ptr()
    for step in range(3):
        give_gradients((plain,), step)
        param.grad = plain.grad.clone() if grad_layout is None else LAYOUTS[grad_layout](plain.grad)
        a.step()
        b.step()
    assert torch.equal(plain, param)
    assert (param.stride(), param.data_ptr()) == (stride, storage)
    for name, tensor in a.state[plain].items():
        assert torch.equal(tensor, b.state[param][name]), name


def test_scalars_and_empty_parameters_train() -> None:
    scalar, empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3))
    optimizer = HybridAdam([scalar, empty])
    (scalar * 3 + empty.sum()).backward()
    optimizer.step()
    assert scalar.item() == pytest.approx(2.0 - 1e-3)
    assert optimizer.state[empty]["step"] == 1


def test_models_of_common_layers_train_like_with_torch_fused() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.LayerNorm(32)
        )

    a, b = build(), build()
    ours, theirs = HybridAdam(a.parameters(), lr=1e-2), torch.optim.AdamW(
        b.parameters(), lr=1e-2, weight_decay=0.0, fused=True
    )  # fmt: skip
    for step, (model, optimizer) in itertools.product(range(8), [(a, ours), (b, theirs)]):
        batch = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch).pow(2).sum().backward()
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
