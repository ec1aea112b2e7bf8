"""A step is all or nothing: whatever allocation fails inside, nothing has happened, and the step can be repeated."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, Trained, check_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemini.errors import OutOfMemory
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.kernels import cpu_update, kernel_pool
from gemini.nn.optimizer.kernels.arithmetic import AdamHyper, scalars
from gemini.nn.optimizer.kernels.update import adam_update
from gemini.nn.optimizer.rules import adam_rule

pytestmark = pytest.mark.timeout(120)


class FailAt(TorchDispatchMode):
    """Every operation that makes a tensor counts as an allocation; the one with this number fails."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(ret.alias_info is None for ret in func._schema.returns):
            number, self.count = self.count, self.count + 1
            if number == self.number:
                raise MemoryError(f"allocation {number} ({func}) fails")
        return func(*args, **(kwargs or {}))


# -- on its own


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 3, 5, 6, generator=generator) for _ in range(5)]
    return [
        nn.Parameter(values[0]),
        nn.Parameter(values[1].bfloat16()),
        nn.Parameter(values[2].to(memory_format=torch.channels_last)),
        nn.Parameter(values[3].double()),
        nn.Parameter(values[4].half()),
    ]


def optimizer_after(steps: int) -> tuple[HybridAdam, list[nn.Parameter]]:
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:], "adamw_mode": False, "weight_decay": 0.2}]
    optimizer = HybridAdam(groups, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    give_gradients(params, steps)
    return optimizer, params


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def everything(optimizer: HybridAdam, params: list[nn.Parameter]) -> list[Tensor]:
    states = [value for p in params for _, value in sorted(optimizer.state.get(p, {}).items())]
    return [tensor.detach().clone() for tensor in (*params, *states)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("steps", [0, 2])
def test_any_failing_allocation_leaves_an_unmanaged_optimizer_as_it_was(steps: int) -> None:
    optimizer_after(3)  # kernels are compiled once in a process
    optimizer, params = optimizer_after(steps)
    with FailAt() as counting:
        optimizer.step()
    expected, allocations = everything(optimizer, params), counting.count
    assert allocations > 10
    for number in range(allocations):
        optimizer, params = optimizer_after(steps)
        before = everything(optimizer, params)
        with pytest.raises(MemoryError), FailAt(number):
            optimizer.step()
        assert same(everything(optimizer, params), before), number
        optimizer.step()
        assert same(everything(optimizer, params), expected), number


def test_the_kernel_itself_changes_nothing_when_it_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.ones(1 << 18) for _ in range(4)]
    at_step = scalars(hyper(), 1)

    def no_memory(*args: Any) -> Any:
        raise MemoryError

    replacements: list[Callable[[pytest.MonkeyPatch], None]] = [
        lambda patch: patch.setattr(kernel_pool.KernelPool, "cut", no_memory),
        lambda patch: patch.setitem(cpu_update.part_kernels, "fp32", no_memory),
    ]
    for replace in replacements:
        with monkeypatch.context() as patch:
            replace(patch)
            patch.setattr(cpu_update, "_ready", set())
            with pytest.raises(MemoryError):
                adam_update("fp32", tensors[:3], tensors[3], at_step)
        assert all(torch.equal(tensor, torch.ones(1 << 18)) for tensor in tensors)


def hyper() -> AdamHyper:
    return AdamHyper(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, decoupled=True, bias_correction=True)


# -- boosted


class WithDouble(Trained):
    """Has a parameter outside of the chunks, too."""

    def __init__(self, placement: dict[str, Any] | None, precision: str = "fp32", **plugin: Any) -> None:
        super().__init__(placement, precision, **plugin)
        self.double = nn.Parameter(torch.ones(8, dtype=torch.float64))
        self.optimizer.add_param_group({"params": [self.double]})

    def loss(self, step: int) -> Tensor:
        return super().loss(step) + (self.double * step).sum()

    def weights(self) -> dict[str, Tensor]:
        return {**super().weights(), "double": self.double.detach().clone()}


def before_step(precision: str, **plugin: Any) -> WithDouble:
    run = WithDouble(PLACEMENTS["streamed"], precision, **plugin)
    run.step(0)
    run.backward(run.loss(1))
    return run


def numbers(run: WithDouble) -> tuple[dict[str, Tensor], Any, Any]:
    run.model._gemini.manager.settle()
    step = run.model._gemini.step
    counts = [step.kept.count(parameter) for parameter in run.model.parameters()]
    return run.weights(), counts, step.scaling.scaler.state_dict() if step.scaling.scaler is not None else None


def check_numbers(a: Any, b: Any) -> None:
    assert [name for name in a[0] if not torch.equal(a[0][name], b[0][name])] == []
    assert a[1] == b[1]
    assert a[2] == b[2]


@pytest.mark.parametrize(
    ("precision", "plugin"), [("fp32", {"max_norm": 0.1}), ("fp16", {"max_norm": 0.1, "initial_scale": 2.0**8})]
)
def test_any_failing_allocation_leaves_a_boosted_optimizer_as_it_was(precision: str, plugin: dict[str, Any]) -> None:
    run = before_step(precision, **plugin)
    with FailAt() as counting:
        run.optimizer.step()
    expected, allocations = numbers(run), counting.count
    assert allocations > 10
    for number in range(0, allocations, max(1, allocations // 12)):
        run = before_step(precision, **plugin)
        before = numbers(run)
        try:
            with FailAt(number):
                run.optimizer.step()
        except (MemoryError, OutOfMemory) as error:
            assert "in optimizer.step()" in str(error) or "profiler" in str(error)  # of torch, around the step
            check_numbers(numbers(run), before)
            run.optimizer.step()
        check_numbers(numbers(run), expected)  # or it has completed


def failing_at(numbers: set[int]) -> Callable[..., None]:
    """An `adam_update` some calls of which find no memory."""
    calls: Iterator[int] = iter(range(1 << 30))

    def update(*args: Any) -> None:
        if next(calls) in numbers:
            raise MemoryError("no memory")
        adam_update(*args)

    return update


def options_of(placement: str, folder: Any) -> dict[str, Any]:
    options = dict(PLACEMENTS[placement])
    if "offload_dir" in options:
        options["offload_dir"] = folder
    return options


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_update_that_ran_out_of_memory_is_tried_again_when_a_unit_needs_its_chunk(
    placement: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(placement, tmp_path)
    plain = Trained(None)
    losses = [plain.step(step) for step in range(4)]
    ours = Trained(options)
    assert ours.step(0) == losses[0]
    ours.model._gemini.manager.settle()
    monkeypatch.setattr(adam_rule, "adam_update", failing_at({0, 2, 3}))
    assert [ours.step(step) for step in range(1, 4)] == losses[1:]
    check_same(ours, plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("atomic", [None, 512], ids=["whole", "slices"])
def test_memory_that_runs_out_in_the_background_is_an_error_and_costs_nothing(
    placement: str, atomic: int | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(placement, tmp_path)
    plain = Trained(None)
    losses = [plain.step(step) for step in range(4)]
    ours = Trained(options)
    assert [ours.step(step) for step in range(2)] == losses[:2]
    ours.model._gemini.manager.settle()
    monkeypatch.setattr(adam_rule, "adam_update", failing_at({*range(16), *range(17, 40, 3)}))
    monkeypatch.setattr(adam_rule, "atomic_numel", lambda device: atomic)
    assert ours.step(2) == losses[2]
    errors = 0
    for _ in range(40):
        try:
            ours.model._gemini.manager.settle()
            break
        except OutOfMemory as error:
            assert "in the optimizer's update of " in str(error)
            assert any(f"{name}" in str(error) for name, _ in plain.model.named_parameters())
            errors += 1
    assert errors >= 1
    monkeypatch.undo()
    assert ours.step(3) == losses[3]
    check_same(ours, plain)
