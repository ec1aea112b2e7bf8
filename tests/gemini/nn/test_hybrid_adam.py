"""HybridAdam on its own: the numbers of torch's fused optimizers, and what it accepts."""

import copy
import itertools
from typing import Any

import pytest
import torch
from adam_cases import hyper as make_hyper
from torch import Tensor, nn

from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.arithmetic import scalars
from gemini.nn.optimizer.reference import adam_reference

STEPS = 12
SETTINGS: list[dict[str, Any]] = [
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8},
    {"lr": 3e-2, "betas": (0.95, 0.98), "eps": 1e-6},
    {"lr": 1e-2, "betas": (0.5, 0.5), "eps": 1e-8},
    {"lr": 1.0, "betas": (0.3, 0.9), "eps": 0.0},
    {"lr": 1e-3, "betas": (0.0, 0.0), "eps": 1e-12},
    {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8},
]


def pair(numel: int, seed: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    return nn.Parameter(values.clone()), nn.Parameter(values.clone())


def give_gradients(params: tuple[Tensor, ...], step: int) -> None:
    """The same gradient for each, with sizes over many orders of magnitude."""
    generator = torch.Generator().manual_seed(1000 + step)
    grad = torch.randn(params[0].shape, generator=generator)
    grad *= 10 ** (2 * torch.randn(params[0].shape, generator=generator))
    for param in params:
        # In float16 the largest would be infinite.
        param.grad = grad.clamp(-6e4, 6e4).to(param.dtype).clone()


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
        adam_reference(expected[0], expected[1], expected[2], b.grad, scalars(h, step + 1))
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


def test_a_parameter_without_a_gradient_is_not_touched() -> None:
    used, unused = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))
    optimizer = HybridAdam([used, unused], weight_decay=0.5)
    used.grad = torch.ones(16)
    optimizer.step()
    assert torch.equal(unused, torch.ones(16))
    assert unused not in optimizer.state
    # Its own count of steps starts when its first gradient comes.
    unused.grad = torch.ones(16)
    optimizer.step()
    assert (optimizer.state[used]["step"].item(), optimizer.state[unused]["step"].item()) == (2.0, 1.0)


def test_each_group_has_its_own_hyperparameters() -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, 32)) for _ in range(3)]
    twins = [nn.Parameter(torch.linspace(-1, 1, 32)) for _ in range(3)]
    ours = HybridAdam(
        [
            {"params": [params[0]], "weight_decay": 0.1},
            {"params": [params[1]], "lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4},
            {"params": [params[2]], "adamw_mode": False, "weight_decay": 0.3},
        ]
    )
    theirs = [
        torch.optim.AdamW([twins[0]], weight_decay=0.1, fused=True),
        torch.optim.AdamW([twins[1]], lr=0.1, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.0, fused=True),
        torch.optim.Adam([twins[2]], weight_decay=0.3, fused=True),
    ]
    for step in range(STEPS):
        give_gradients((*params, *twins), step)
        for optimizer in (ours, *theirs):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_a_learning_rate_scheduler_drives_it_like_torch() -> None:
    a, b = pair(64)
    optimizers = [HybridAdam([a], lr=0.1), torch.optim.AdamW([b], lr=0.1, weight_decay=0.0, fused=True)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10) for o in optimizers]
    for step in range(STEPS):
        give_gradients((a, b), step)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert torch.equal(a, b)


def test_the_closure_runs_first_with_gradients_and_its_loss_is_returned() -> None:
    param = nn.Parameter(torch.ones(16))
    optimizer = HybridAdam([param], lr=0.5)

    def closure() -> Tensor:
        loss = (param * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 32.0
    torch.testing.assert_close(param.detach(), torch.full((16,), 0.5))
    assert optimizer.step() is None


def test_a_graph_that_still_needs_the_old_value_is_noticed() -> None:
    param = nn.Parameter(torch.ones(16))
    optimizer = HybridAdam([param])
    loss = (param**2).sum()
    param.grad = torch.ones(16)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_gradients_are_refused_before_any_parameter_changes() -> None:
    dense, embedding = nn.Parameter(torch.ones(16)), nn.Embedding(10, 4, sparse=True)
    optimizer = HybridAdam([{"params": [dense]}, {"params": embedding.parameters()}])
    (dense.sum() + embedding(torch.tensor([1, 2])).sum()).backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(16))
    assert not optimizer.state


def test_complex_parameters_are_refused_and_leave_no_group_behind() -> None:
    optimizer = HybridAdam([nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"complex64.*view_as_real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1e-8), ("weight_decay", -1.0)],
)
def test_hyperparameters_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="beta1" if name == "betas" else name):
        HybridAdam([nn.Parameter(torch.ones(2))], **{name: value})
    optimizer = HybridAdam([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], name: value})
    assert len(optimizer.param_groups) == 1


def test_placing_states_on_disk_is_the_plugins_work() -> None:
    params = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"GeminiPlugin\(offload_dir=\.\.\.\)"):
        HybridAdam(params, nvme_offload_fraction=0.5, nvme_offload_dir="somewhere")
    optimizer = HybridAdam(params, nvme_offload_fraction=0.0, nvme_offload_dir="somewhere")
    assert (optimizer.nvme_offload_fraction, optimizer.nvme_offload_dir) == (0.0, "somewhere")


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_options_of_torch_that_it_lacks_are_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        HybridAdam([{"params": [nn.Parameter(torch.ones(2))], option: True}])


def test_prepare_and_commit_step_some_parameters_of_a_group() -> None:
    a, b, other = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))
    optimizer, twin = HybridAdam([a, other], weight_decay=0.1), HybridAdam([b], weight_decay=0.1)
    for step in range(3):
        give_gradients((a, b, other), step)
        b.grad *= 0.25
        optimizer.commit_parameters(optimizer.prepare_parameters(optimizer.param_groups[0], [a], grad_scale=0.25))
        twin.step()
    assert torch.equal(a, b)
    assert torch.equal(other, torch.ones(16))


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_equals_torch(norm_type: float) -> None:
    a, b = pair(100)
    give_gradients((a, b), 0)
    norm = HybridAdam([a]).clip_grad_by_norm(1.0, norm_type)
    assert torch.equal(norm, nn.utils.clip_grad_norm_([b], 1.0, norm_type))
    assert torch.equal(a.grad, b.grad)
    HybridAdam([a]).clip_grad_by_value(0.01)
    nn.utils.clip_grad_value_([b], 0.01)
    assert torch.equal(a.grad, b.grad)
    a.grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        HybridAdam([a]).clip_grad_by_norm(1.0, error_if_nonfinite=True)


def test_zero_grad_and_step_hooks_work_as_in_torch() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = HybridAdam([param])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    param.grad = torch.ones(4)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(param.grad, torch.zeros(4))
    optimizer.zero_grad()
    assert param.grad is None
    assert calls == ["pre", "post"]


def test_the_gradient_scaler_of_torch_works_with_it() -> None:
    param = nn.Parameter(torch.ones(16))
    optimizer = HybridAdam([param], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in [(float("inf"), 1.0), (1.0, 0.5)]:
        optimizer.zero_grad()
        scaler.scale(param.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(param.detach(), torch.full((16,), expected))


def test_a_copied_optimizer_is_independent() -> None:
    model = nn.Linear(4, 4)
    optimizer = HybridAdam(model.parameters(), nvme_offload_dir="somewhere")
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.nvme_offload_dir == "somewhere"
    before = model.weight.clone()
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    twin.step()
    assert torch.equal(model.weight, before)


class Manager:
    """Writes down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def step(self, optimizer: HybridAdam) -> None:
        self.calls.append(("step",))

    def zero_grad(self, optimizer: HybridAdam) -> None:
        self.calls.append(("zero_grad",))

    def state_dict(self, optimizer: HybridAdam) -> dict[str, Any]:
        return {"managed": True}

    def load_state_dict(self, optimizer: HybridAdam, state_dict: dict[str, Any]) -> None:
        self.calls.append(("load_state_dict", state_dict))

    def add_param_group(self, optimizer: HybridAdam, group: dict[str, Any]) -> None:
        optimizer.register_param_group(group)

    def clip_grad_by_norm(
        self, optimizer: HybridAdam, max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        self.calls.append(("clip_grad_by_norm", max_norm, norm_type, error_if_nonfinite))
        return torch.tensor(7.0)

    def clip_grad_by_value(self, optimizer: HybridAdam, value: float) -> None:
        self.calls.append(("clip_grad_by_value", value))


def test_a_managed_optimizer_hands_everything_over() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer, manager = HybridAdam([param]), Manager()
    optimizer._managed = manager
    param.grad = torch.ones(4)
    assert optimizer.step(lambda: 5) == 5
    optimizer.zero_grad()
    assert optimizer.state_dict() == {"managed": True}
    optimizer.load_state_dict({"saved": 1})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert optimizer.clip_grad_by_norm(1.0).item() == 7.0
    optimizer.clip_grad_by_value(2.0)
    assert manager.calls == [
        ("step",),
        ("zero_grad",),
        ("load_state_dict", {"saved": 1}),
        ("clip_grad_by_norm", 1.0, 2.0, False),
        ("clip_grad_by_value", 2.0),
    ]
    assert torch.equal(param, torch.ones(4))
    assert param.grad is not None
    assert len(optimizer.param_groups) == 2
    with pytest.raises(TypeError, match="save_optimizer"):
        copy.deepcopy(optimizer)


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
