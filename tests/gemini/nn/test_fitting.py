"""Kernels get addresses: what does not fit a parameter any more is an error before a byte is written, in every path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemini.lazy import LazyInitContext
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.elementwise_optimizer import ElementwiseOptimizer
from gemini.nn.optimizer.kernels import reference, update
from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.rules.elementwise import kind_of
from gemini.nn.optimizer.unmanaged import batch
from gemini.nn.optimizer.unmanaged.fitting import overlaps_itself

SHAPE = (6, 4)
COUNT = batch.LEAST + 2

PATHS = ["batched", "one by one", "torch operations"]


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[nn.Parameter], HybridAdam]:
    """After one step, with the gradients of the next."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(SHAPE, generator=generator).to(dtype)) for _ in range(COUNT)]
    optimizer = HybridAdam([(f"layer{i}", p) for i, p in enumerate(params)], lr=0.1, weight_decay=0.1, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(SHAPE, generator=generator).to(dtype)
        if not optimizer.state:
            optimizer.step()
    return params, optimizer


def choose(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "batched":
        monkeypatch.setattr(batch, "LEAST", 1 << 60)
    if path == "torch operations":
        monkeypatch.setattr(update, "KERNELS", {("cpu", form): kernel for form, kernel in reference.BY_FORM.items()})


def everything(params: list[nn.Parameter], optimizer: HybridAdam) -> list[Tensor]:
    states = [value for p in params for _, value in sorted(optimizer.state.get(p, {}).items())]
    return [tensor.detach().clone() for tensor in (*params, *states) if not tensor.is_meta]


def grown(p: nn.Parameter, o: HybridAdam) -> None:
    p.data = p.data.new_ones(50, 4)


def grown_with_its_gradient(p: nn.Parameter, o: HybridAdam) -> None:
    p.data, p.grad = p.data.new_ones(50, 4), None
    p.grad = torch.ones_like(p)


def shrunk(p: nn.Parameter, o: HybridAdam) -> None:
    p.data = p.data[:2].clone()


def emptied(p: nn.Parameter, o: HybridAdam) -> None:
    p.data, p.grad = p.data.new_empty(0, 4), None
    p.grad = torch.ones_like(p)


def turned(p: nn.Parameter, o: HybridAdam) -> None:
    p.data, p.grad = p.data.t().contiguous(), None
    p.grad = torch.ones_like(p)


def flattened(p: nn.Parameter, o: HybridAdam) -> None:
    p.data, p.grad = p.data.flatten(), None
    p.grad = torch.ones_like(p)


def in_double(p: nn.Parameter, o: HybridAdam) -> None:
    p.data, p.grad = p.data.double(), None
    p.grad = torch.ones_like(p)


def expanded(p: nn.Parameter, o: HybridAdam) -> None:
    p.data = p.data[:1].clone().expand(SHAPE)


def without_memory(p: nn.Parameter, o: HybridAdam) -> None:
    p.data.untyped_storage().resize_(0)


def gradient_of_another_shape(p: nn.Parameter, o: HybridAdam) -> None:
    p.grad.resize_(2, 4)  # type: ignore[union-attr]


def gradient_without_memory(p: nn.Parameter, o: HybridAdam) -> None:
    p.grad.untyped_storage().resize_(0)  # type: ignore[union-attr]


def moment_of_another_shape(p: nn.Parameter, o: HybridAdam) -> None:
    o.state[p]["exp_avg"] = o.state[p]["exp_avg"][:1].clone()


def moment_resized(p: nn.Parameter, o: HybridAdam) -> None:
    o.state[p]["exp_avg_sq"].resize_(3)


def moment_expanded(p: nn.Parameter, o: HybridAdam) -> None:
    moment = o.state[p]["exp_avg"]
    o.state[p]["exp_avg"] = moment.new_zeros(1, 1).expand(SHAPE)


def moment_of_another_dtype(p: nn.Parameter, o: HybridAdam) -> None:
    o.state[p]["exp_avg"] = torch.zeros(SHAPE, dtype=torch.int16)


def moment_without_memory(p: nn.Parameter, o: HybridAdam) -> None:
    o.state[p]["exp_avg_sq"] = torch.zeros(SHAPE, dtype=o.state[p]["exp_avg_sq"].dtype, device="meta")


def moment_missing(p: nn.Parameter, o: HybridAdam) -> None:
    del o.state[p]["exp_avg"]


def moment_a_number(p: nn.Parameter, o: HybridAdam) -> None:
    o.state[p]["exp_avg"] = 0.0


def step_without_elements(p: nn.Parameter, o: HybridAdam) -> None:
    o.state[p]["step"] = torch.zeros(0)


def step_a_number(p: nn.Parameter, o: HybridAdam) -> None:
    o.state[p]["step"] = 3


CHANGES = [
    (grown, "gradient"), (grown_with_its_gradient, "exp_avg"), (shrunk, "gradient"), (emptied, "exp_avg"),
    (turned, "exp_avg"), (flattened, "exp_avg"), (in_double, "exp_avg|float64 parameter"), (expanded, "share memory"),
    (without_memory, "no memory"), (gradient_of_another_shape, "gradient"), (gradient_without_memory, "no memory"),
    (moment_of_another_shape, "exp_avg"), (moment_resized, "exp_avg_sq"), (moment_expanded, "share memory"),
    (moment_of_another_dtype, "int16"), (moment_without_memory, "meta"), (moment_missing, "is missing"),
    (moment_a_number, "float"), (step_without_elements, "step"), (step_a_number, "step"),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"states": "bf16"}),
        (torch.float32, {"states": "8bit"}),
    ],
    ids=["fp32", "bf16", "states in bf16", "states in 8 bits"],
)
def test_what_does_not_fit_is_named_before_anything_is_written(
    path: str, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for change, says in CHANGES:
        params, optimizer = trained(dtype, **options)
        choose(path, monkeypatch)
        victim = COUNT - 2  # so that others come first
        change(params[victim], optimizer)
        others = params[:victim] + params[victim + 1 :]
        before = everything(others, optimizer)
        with pytest.raises((ValueError, TypeError), match=says) as caught:
            optimizer.step()
        assert change is in_double or f"layer{victim} " in str(caught.value), change.__name__
        assert all(map(torch.equal, before, everything(others, optimizer))), change.__name__
        monkeypatch.undo()


def test_a_master_that_does_not_fit_is_named() -> None:
    for give in (lambda s: s["master"].resize_(5), lambda s: s.update(master=torch.zeros(SHAPE, dtype=torch.bfloat16))):
        params, optimizer = trained(torch.bfloat16)
        give(optimizer.state[params[3]])
        with pytest.raises(ValueError, match="master of layer3"):
            optimizer.step()


def test_scales_of_8_bit_states_must_be_one_for_each_block() -> None:
    params, optimizer = trained(states="8bit")
    optimizer.state[params[3]]["exp_avg_scale"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"exp_avg_scale of layer3 .*\(2,\), expected \(1,\)"):
        optimizer.step()


@pytest.mark.parametrize("path", PATHS)
def test_gradients_may_lie_in_memory_as_they_like(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
        params, optimizer = trained()
        for param in params:
            param.grad = layout(torch.arange(24.0).view(SHAPE))
        optimizer.step()
        return everything(params, optimizer)

    choose(path, monkeypatch)
    plain = run(lambda gradient: gradient)
    for layout in (lambda g: g.t().contiguous().t(), lambda g: torch.stack([g, g], dim=-1)[..., 0]):
        assert all(map(torch.equal, plain, run(layout)))
    rows = run(lambda gradient: gradient[:1].expand(SHAPE))
    assert all(map(torch.equal, run(lambda gradient: gradient[:1].repeat(6, 1)), rows))


def test_states_that_share_memory_are_updated_in_turn_and_shared_steps_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for path in PATHS:
        choose(path, monkeypatch)
        params, optimizer = trained()
        optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"]
        optimizer.step()
        results.append(everything(params, optimizer))
        params, optimizer = trained()
        optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
        with pytest.raises(ValueError, match="share the step"):
            optimizer.step()
        monkeypatch.undo()
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_a_parameter_that_grew_trains_on_with_a_new_state() -> None:
    params, optimizer = trained()
    grown_with_its_gradient(params[0], optimizer)
    optimizer.state.pop(params[0])
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].shape == (50, 4)


def test_an_old_master_does_not_come_back_after_training_without_it() -> None:
    params, optimizer = trained(torch.bfloat16)
    for param in params:
        param.data, param.grad = param.data.float(), None
        param.grad = torch.ones(SHAPE)
    optimizer.step()
    assert all("master" not in optimizer.state[param] for param in params)
    for param in params:
        param.data, param.grad = param.data.bfloat16(), None
        param.grad = torch.zeros(SHAPE, dtype=torch.bfloat16)
    shown = params[0].detach().float()
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()
    assert torch.equal(params[0].float(), shown)


@pytest.mark.parametrize("count", [1, COUNT])
def test_a_step_inside_lazy_init_context_is_refused(count: int) -> None:
    params = [nn.Parameter(torch.ones(SHAPE)) for _ in range(count)]
    optimizer = HybridAdam(params)
    for param in params:
        param.grad = torch.ones(SHAPE)
    with LazyInitContext(), pytest.raises(RuntimeError, match="leave the context"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()


def test_kernels_get_no_address_of_memory_that_is_not_there() -> None:
    tensors = [torch.zeros(8) for _ in range(4)]
    at_step = scalars(AdamHyper.of_group(HybridAdam([nn.Parameter(torch.ones(1))]).param_groups[0]), 1)
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="has no memory"):
            update.adam_update("fp32", tensors[:3], tensors[3], at_step)
        tensor.untyped_storage().resize_(32)


def test_an_elementwise_optimizer_names_what_does_not_fit() -> None:
    plain = torch.optim.SGD([nn.Parameter(torch.ones(SHAPE)), nn.Parameter(torch.ones(SHAPE))], lr=0.1, momentum=0.9)
    optimizer = ElementwiseOptimizer(kind_of(plain), plain)  # type: ignore[arg-type]
    first, second = optimizer.param_groups[0]["params"]
    for change, says in ((grown, "gradient of parameter 1"), (expanded, "share memory"), (without_memory, "no memory")):
        for param in (first, second):
            param.data, param.grad = torch.ones(SHAPE), None
            param.grad = torch.ones(SHAPE)
        change(second, optimizer)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=says):
            optimizer.step()
        assert torch.equal(first, torch.ones(SHAPE))
    second.data, second.grad = torch.ones(SHAPE), None
    second.grad = torch.ones(SHAPE)
    optimizer.step()
    second.data, second.grad = torch.ones(50, 4), None
    second.grad = torch.ones(50, 4)
    with pytest.raises(ValueError, match="momentum_buffer of parameter 1"):
        optimizer.step()


def test_memory_that_overlaps_is_told_from_memory_that_does_not() -> None:
    memory = torch.zeros(100)
    for shape, stride, overlaps in (
        ((4, 5), (5, 1), False), ((4, 5), (1, 4), False), ((4, 5), (0, 1), True), ((4, 5), (1, 1), True),
        ((2, 3), (3, 2), False), ((3, 4), (3, 2), True), ((1, 5), (0, 1), False), ((0, 5), (0, 0), False),
    ):  # fmt: skip
        assert overlaps_itself(memory.as_strided(shape, stride)) is overlaps, (shape, stride)
