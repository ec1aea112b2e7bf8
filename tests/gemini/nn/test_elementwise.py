"""Torch optimizers on flat pieces: the bits of their own step on tensors, all or nothing; what may be registered."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_optimizers import ELEMENTWISE, make
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import register_elementwise
from gemini.nn.optimizer.acceptance import accepted
from gemini.nn.optimizer.elementwise_optimizer import ElementwiseOptimizer
from gemini.nn.optimizer.kernels import kernel_pool
from gemini.nn.optimizer.kernels.kernel_pool import KernelPool
from gemini.nn.optimizer.rules import elementwise, elementwise_rule, pieces
from gemini.nn.optimizer.rules.rule import Form

pytestmark = pytest.mark.timeout(120)

NUMEL = 5000


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of 96 elements, two of them at once."""
    monkeypatch.setattr(pieces, "_CPU_PIECE_NUMEL", 96)
    monkeypatch.setattr(pieces, "_AT_ONCE", 2)
    return 96


def rule_of(optimizer: Optimizer) -> elementwise_rule.ElementwiseRule:
    found = accepted(optimizer)
    assert isinstance(found, ElementwiseOptimizer)
    return found.rule


class Flat:
    """One tensor, and an optimizer's rule that updates it in flat buffers."""

    def __init__(self, name: str, value: Tensor, **options: Any) -> None:
        optimizer = make(name, [nn.Parameter(value.clone())], **options)
        self.group = optimizer.param_groups[0]
        self.rule = rule_of(optimizer)
        self.param = value.clone()
        self.slots = self.rule.slots(self.group)
        self.states = [torch.full_like(value, self.rule.initial(slot.name)) for slot in self.slots]
        self.side: dict[str, Tensor] = {}

    def step(self, number: int, grad: Tensor, cuts: list[int], grad_scale: float = 1.0, out: Any = None) -> None:
        form = Form(tuple(self.param.shape), (1,), self.side)
        at_step = self.rule.bind(self.group, self.slots)(number, grad_scale, None, form)
        sides = isinstance(at_step, elementwise_rule.ElementwiseUpdate)
        after = dict(at_step.side_after()) if sides else {}  # type: ignore[attr-defined]
        for start, stop in zip([0, *cuts], [*cuts, len(self.param)], strict=True):
            cut = slice(start, stop)
            at_step.apply(self.param[cut], [s[cut] for s in self.states], grad[cut], None if out is None else out[cut])
        self.side = after

    def state(self, name: str) -> Tensor:
        return self.states[[slot.name for slot in self.slots].index(name)]


@settings(deadline=None, max_examples=12)
@given(cuts=st.lists(st.integers(0, NUMEL), max_size=5).map(sorted), seed=st.integers(0, 1000))
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_any_cut_of_a_buffer_has_the_bits_of_torchs_own_step(name: str, cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(NUMEL, generator=generator)
    theirs = nn.Parameter(value.clone())
    plain, ours = make(name, [theirs]), Flat(name, value)
    for number in range(1, 5):
        grad = torch.randn(NUMEL, generator=generator) * 10.0 ** (number % 3 - 2)
        theirs.grad = grad.clone()
        plain.step()
        before = grad.clone()
        ours.step(number, grad, cuts)
        assert torch.equal(grad, before)
        assert torch.equal(ours.param, theirs)
        for slot in ours.slots:
            assert torch.equal(ours.state(slot.name), plain.state[theirs][slot.name])


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_widened_and_scaled_and_the_copy_is_rounded_once(
    name: str, dtype: torch.dtype, small_pieces: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1001, generator=generator)
    theirs = nn.Parameter(value.clone())
    plain, ours, out = make(name, [theirs]), Flat(name, value), torch.empty(1001, dtype=dtype)
    for number in range(1, 4):
        grad = torch.randn(1001, generator=generator).to(dtype)
        theirs.grad = grad.float() * 0.3
        plain.step()
        ours.step(number, grad, [], 0.3, out)
        assert torch.equal(ours.param, theirs)
        assert torch.equal(out, theirs.to(dtype))


class FailAt(TorchDispatchMode):
    """The operation with this number, of those that make a tensor, finds no memory."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(ret.alias_info is None for ret in func._schema.returns):
            self.left -= 1
            if self.left < 0:
                raise MemoryError(f"{func} fails")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All work on the caller's thread: a dispatch mode holds for one thread."""
    pool = KernelPool(1)
    monkeypatch.setattr(pieces, "default_pool", lambda: pool)
    yield
    pool.close()


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("number", [1, 3], ids=["first step", "later"])
def test_any_failing_allocation_leaves_the_elements_in_work_as_they_were(
    name: str, number: int, small_pieces: int, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    value, grad = torch.randn(150, generator=generator), torch.randn(150, generator=generator).bfloat16()
    monkeypatch.setattr(pieces, "atomic_numel", lambda device: 192)
    fresh = Flat(name, value)
    for earlier in range(1, number):
        fresh.step(earlier, grad, [])
    before = [tensor.clone() for tensor in (fresh.param, *fresh.states)]
    failures = 0
    while True:
        try:
            with FailAt(failures):
                fresh.step(number, grad, [], 0.5)
            break
        except MemoryError:
            failures += 1
            for tensor, value in zip((fresh.param, *fresh.states), before, strict=True):
                assert torch.equal(tensor, value), failures
    assert failures >= 1
    assert not torch.equal(fresh.param, before[0])


# -- registering


class Lion(Optimizer):
    """Sign of an interpolation of gradient and momentum (Chen et al., "Symbolic discovery of ...", 2023)."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                first, second = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((state["exp_avg"] * first + p.grad * (1 - first)).sign(), alpha=-group["lr"])
                state["exp_avg"] = state["exp_avg"] * second + p.grad * (1 - second)  # another tensor


class WholeNorm(Lion):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.sub_(p.grad / p.grad.norm(), alpha=self.param_groups[0]["lr"])


class Noisy(Lion):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.add_(torch.randn_like(p))


class CountsInItsGroup(Lion):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["count"] = group.get("count", 0) + 1
        super().step()


class TwoStates(Lion):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["other"] = torch.zeros_like(p)


class Counting(Lion):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1


class RowStates(Lion):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("exp_avg", torch.zeros(()))


@pytest.fixture(autouse=True)
def kinds_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_KINDS", dict(elementwise._KINDS))


def test_a_registered_optimizer_trains_managed_with_its_own_bits(tmp_path: Any) -> None:
    register_elementwise(Lion, ["exp_avg"])
    register_elementwise(Counting, lambda options: ["exp_avg"], takes_step=True)
    for cls in (Lion, Counting):
        models, optimizers = [], []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 3)))
            optimizers.append(cls(models[-1].parameters(), lr=0.01))
        booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
        models[0], optimizers[0], *_ = booster.boost(models[0], optimizers[0])
        for step in range(4):
            x = torch.randn(5, 33, generator=torch.Generator().manual_seed(step))
            losses = [model(x).square().mean() for model in models]
            booster.backward(losses[0], optimizers[0])
            losses[1].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert torch.equal(*losses)
        states = [optimizer.state_dict()["state"] for optimizer in optimizers]
        for index, state in states[1].items():
            assert state.keys() == states[0][index].keys()
            assert torch.equal(state["exp_avg"], states[0][index]["exp_avg"])
            assert int(state.get("step", 0)) == int(states[0][index].get("step", 0)) == (4 if cls is Counting else 0)
        booster.save_optimizer(optimizers[0], tmp_path / cls.__name__)
        booster.load_optimizer(optimizers[0], tmp_path / cls.__name__)


@pytest.mark.parametrize(
    ("cls", "states", "reason"),
    [
        (WholeNorm, ["exp_avg"], "WholeNorm with these options is not element-wise: .*the parameter"),
        (Noisy, ["exp_avg"], "Noisy draws random numbers"),
        (CountsInItsGroup, ["exp_avg"], "CountsInItsGroup changes count of its group"),
        (TwoStates, ["exp_avg"], r"TwoStates keeps \['exp_avg', 'other'\] for each parameter; it is registered with"),
        (Lion, ["momentum"], r"Lion keeps \['exp_avg'\] for each parameter; it is registered with \['momentum'\]"),
        (Counting, ["exp_avg"], "Counting has the step 1 in its state after 1 steps; it is registered with takes_step"),
        (RowStates, ["exp_avg"], "RowStates: exp_avg must be float32 and have the parameter's shape"),
    ],
)
def test_a_registered_optimizer_that_is_not_what_it_was_said_to_be_is_refused(
    cls: Any, states: list[str], reason: str
) -> None:
    register_elementwise(cls, states)
    model = nn.Linear(4, 4)
    drawn = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=reason):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, cls(model.parameters()))
    assert type(model) is nn.Linear
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_mistakes_of_registering_are_named() -> None:
    with pytest.raises(TypeError, match=r"expected a class of torch\.optim\.Optimizer, got 3"):
        register_elementwise(3, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SGD is known already"):
        register_elementwise(torch.optim.SGD, ["x"])
    with pytest.raises(TypeError, match="give a sequence of names"):
        register_elementwise(Lion, "exp_avg")


# -- threads


def test_a_thread_that_keeps_to_itself_starts_no_others_and_leaves_the_rest_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pool = KernelPool(2)
        seen = pool._helpers[0].submit(torch.get_num_threads).result(timeout=30)
        assert seen == 1
        assert torch.get_num_threads() == 3
        other = kernel_pool.ThreadPoolExecutor(1)
        assert other.submit(torch.get_num_threads).result(timeout=30) == 3
        other.shutdown()
        pool.close()
    finally:
        torch.set_num_threads(before)
