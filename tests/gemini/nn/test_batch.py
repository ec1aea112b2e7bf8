"""Many small parameters in one call of the kernel: the bits of one call for each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.kernels import kernel_pool, reference, update
from gemini.nn.optimizer.kernels.kernel_pool import KernelPool
from gemini.nn.optimizer.unmanaged import batch
from gemini.nn.optimizer.unmanaged.batch import LEAST, SMALL_NUMEL, PreparedBatch
from gemini.process_wide import PerProcess

pytest.importorskip("numba")

STEPS = 4
SHAPES = [*((n,) for n in range(1, 30)), (16, 16), (257,), (0,), (3, 5, 7), (300, 300), (), (SMALL_NUMEL + 1,)]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches batches off."""
    return lambda: monkeypatch.setattr(batch, "LEAST", 1 << 60)


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    values.append(torch.randn(2, 3, 4, 5, generator=generator).to(dtype, memory_format=torch.channels_last))
    return [nn.Parameter(value) for value in values]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if step == 1 and i % 4 == 0 else gradient  # so that some are a step behind


def train(params: list[nn.Parameter], **options: Any) -> list[Tensor]:
    """All values and states after some steps."""
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.03}]
    optimizer = HybridAdam(groups, lr=1e-2, weight_decay=0.1, **options)
    for step in range(STEPS):
        give_gradients(params, step)
        optimizer.step()
    return everything(optimizer, params)


def everything(optimizer: HybridAdam, params: list[nn.Parameter]) -> list[Tensor]:
    states = [value for p in params for _, value in sorted(optimizer.state.get(p, {}).items())]
    return [tensor.detach().clone() for tensor in (*params, *states)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"adamw_mode": False}),
        (torch.float16, {"states": "bf16"}),
        (torch.bfloat16, {"states": "8bit"}),
    ],
    ids=["fp32", "bf16, L2", "fp16, states in bf16", "bf16, states in 8 bits"],
)
def test_batches_give_the_bits_of_single_calls(dtype: torch.dtype, options: dict[str, Any], one_by_one: Any) -> None:
    batched = train(parameters(dtype), **options)
    one_by_one()
    assert same(batched, train(parameters(dtype), **options))


def test_what_is_small_and_plain_is_in_a_batch_and_the_rest_is_not() -> None:
    params = parameters(torch.float32)
    give_gradients(params, 0)
    optimizer = HybridAdam(params)
    prepared = optimizer.prepare_parameters(optimizer.param_groups[0], params)
    batches = [step for step in prepared if isinstance(step, PreparedBatch)]
    singles = [step.param.shape for step in prepared if not isinstance(step, PreparedBatch)]
    assert [len(found.found) for found in batches] == [len(params) - 4]
    assert singles == [(0,), (300, 300), (SMALL_NUMEL + 1,), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", [(64,), (1 << 14,)], ids=["one thread", "several threads"])
def test_all_threads_together_give_the_bits_of_one(
    shape: tuple[int, ...], one_by_one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[Tensor]:
        params = [nn.Parameter(torch.full(shape, 0.1 * i)) for i in range(40)]
        return train(params)

    pool = KernelPool(3)
    monkeypatch.setattr(kernel_pool, "_of_process", PerProcess(lambda: pool))
    batched = run()
    pool.close()
    monkeypatch.setattr(kernel_pool, "_of_process", PerProcess(lambda: KernelPool(1)))
    one_by_one()
    assert same(batched, run())


@pytest.mark.parametrize("other", [(8,), (SMALL_NUMEL + 8,)], ids=["small", "large"])
def test_parameters_that_share_memory_are_updated_one_after_the_other(other: tuple[int], one_by_one: Any) -> None:
    def run() -> list[Tensor]:
        memory = torch.linspace(-1, 1, other[0])
        tied = [nn.Parameter(memory), nn.Parameter(memory[4:8])]
        params = [*(nn.Parameter(torch.ones(8)) for _ in range(LEAST)), *tied]
        optimizer = HybridAdam(params, lr=0.1, weight_decay=0.5)
        for step in range(STEPS):
            give_gradients(params, step)
            optimizer.step()
        return everything(optimizer, params)

    batched = run()
    one_by_one()
    assert same(batched, run())


def test_states_that_were_loaded_in_another_form_give_the_same_bits(one_by_one: Any) -> None:
    def run() -> list[Tensor]:
        params = [nn.Parameter(torch.full((4, 6), 0.1 * i)) for i in range(LEAST + 8)]
        optimizer = HybridAdam(params, lr=0.1)
        give_gradients(params, 0)
        optimizer.step()
        for param in params[:4]:
            state = optimizer.state[param]
            state["exp_avg"] = state["exp_avg"].t().contiguous().t()
            state["step"] = state["step"].double()
        give_gradients(params, 2)
        optimizer.step()
        return everything(optimizer, params)

    batched = run()
    one_by_one()
    assert same(batched, run())


class FailAt(TorchDispatchMode):
    """Every operation that makes a tensor counts as an allocation; the one with this number fails."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(ret.alias_info is None for ret in func._schema.returns):
            number, self.count = self.count, self.count + 1
            if number == self.number:
                raise MemoryError(f"allocation {number} ({func}) fails")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [0, 1])
def test_any_failing_allocation_leaves_all_as_it_was(steps: int) -> None:
    def made() -> tuple[HybridAdam, list[nn.Parameter]]:
        params = [nn.Parameter(torch.full((4,), 0.1 * i).bfloat16()) for i in range(LEAST)]
        optimizer = HybridAdam(params, lr=0.1)
        for step in range(steps):
            give_gradients(params, 2 + step)
            optimizer.step()
        give_gradients(params, 9)
        return optimizer, params

    optimizer, params = made()
    with FailAt() as counting:
        optimizer.step()
    expected = everything(optimizer, params)
    assert counting.count >= (1 if steps else LEAST)
    for number in range(0, counting.count, 5):
        optimizer, params = made()
        before = everything(optimizer, params)
        with pytest.raises(MemoryError), FailAt(number):
            optimizer.step()
        assert same(everything(optimizer, params), before), number
        optimizer.step()
        assert same(everything(optimizer, params), expected), number


def test_a_graph_that_still_needs_the_old_values_is_noticed() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(LEAST)]
    give_gradients(params, 0)
    loss = (params[5] * params[6]).sum()
    HybridAdam(params).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_the_kernel_there_are_no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(parameters(torch.float32))
    monkeypatch.setattr(update, "KERNELS", {("cpu", form): kernel for form, kernel in reference.BY_FORM.items()})
    assert same(train(parameters(torch.float32)), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("numels", [[], [1], [1 << 16] * 7, [1, 1 << 20, 1], [5] * 1000, [1 << 14] * 100])
def test_rows_are_cut_into_neighbours_of_about_equal_work(numels: list[int], threads: int) -> None:
    pool = KernelPool(threads)
    found = pool.cut_rows(numels)
    pool.close()
    assert [i for rows in found for i in range(rows.start, rows.stop)] == list(range(len(numels)))
    assert len(found) <= threads
    sizes = [sum(numels[rows]) for rows in found]
    assert max(sizes) <= sum(numels) / len(found) + max(numels, default=0)
