"""A forward that runs again in backward leaves the bits, the modules and the random states of one that does not."""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar
from weakref import ReferenceType, WeakSet, ref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gemini.activations.inputs import InputCopies
from gemini.activations.recompute import RecomputedVisit, Saved
from gemini.activations.repeatable import why_not
from gemini.torch_private import current_backward
from gemini.units.attached import Attached
from gemini.units.bracket import bracket

WIDTH = 16


class Here:
    alive: ClassVar[WeakSet["Here"]] = WeakSet()
    is_changed = False

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self.alive.add(self)

    def unpack(self) -> Tensor:
        return self._tensor


class Recomputing:
    """Has blocks computed again, wherever they can be."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.outcomes: list[str] = []
        self.reasons: list[str] = []
        self._copies = InputCopies()
        self._changing: dict[nn.Module, Any] = {}
        self._open: list[tuple[RecomputedVisit, Any]] = []
        for block in blocks:
            bracket(block, self._before, self._after)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if current_backward() != -1 or not torch.is_grad_enabled():
            return
        visit = RecomputedVisit("block", module, args, kwargs, self._changing.get(module, ()))
        hooks = saved_tensors_hooks(partial(visit.save, keep=Here), Saved.unpack)
        hooks.__enter__()
        self._open.append((visit, hooks))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if current_backward() != -1 or not torch.is_grad_enabled():
            return
        visit, hooks = self._open.pop()
        hooks.__exit__()
        if reason := visit.why_held():
            visit.hold()
            self.reasons.append(reason.text)
            self._changing[module] = reason.changing
        else:
            visit.drop(self._copies, Here)
        self.outcomes.append("held" if reason else "dropped")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Normalised(Block):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.batch_norm(x))


class Drops(Block):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.3)


class DrawsElsewhere(Block):
    """Depends on the generators of Python and numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * random.random() + float(np.random.rand()))


class OwnGenerator(Block):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.rand(x.shape, generator=self.generator))


class CountsAndRemembers(Block):
    """Scales by the number of its calls, and keeps its outputs in a list and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last, self.seen = 0, torch.zeros(()), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x / self.calls + 0.1 * self.last.mean().detach())
        self.seen.append(y)
        self.last = y
        return y


class PowerIteration(Block):
    """Changes a buffer in place, and computes with it."""

    u: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.u.mul_(0.9).add_(x.detach().mean(dim=(0, 1)), alpha=0.1)
        return super().forward(x + self.u.clone())


class InPlaceInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        return super().forward(x)


class Keeps(Block):
    """Scales by what it makes of an object that it keeps in an attribute."""

    def __init__(self, kept: Any, use: Callable[[Any], float]) -> None:
        super().__init__()
        self.kept, self.use = kept, use

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.use(self.kept))


class Config:
    def __init__(self) -> None:
        self.scale, self.sizes, self.more = 1.0, [1, 2], {"kind": "silu"}


class Counts:
    calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return float(self.calls)


def appended(kept: list[Any]) -> float:
    kept.append(len(kept))
    return float(kept[-1])


def counted(kept: Any) -> float:
    kept["n"] += 1
    return float(kept["n"])


def raised(kept: Any) -> float:
    kept += 1
    return float(kept.sum()) / 10


def normalised(kept: list[nn.Module]) -> float:
    kept[0](torch.arange(6.0).view(2, 3))
    return float(kept[0].running_mean.sum())  # type: ignore[operator]


class Aliases(Block):
    """Has one list in two attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.one[0] += 1
        return super().forward(x * self.other[0])


DEEP: dict[str, Callable[[], nn.Module]] = {
    "a list in a list": lambda: Keeps([[], [1]], lambda kept: appended(kept[1])),
    "a list in a tuple": lambda: Keeps(([1],), lambda kept: appended(kept[0])),
    "a counter": lambda: Keeps(Counter(), counted),
    "a defaultdict": lambda: Keeps(defaultdict(int), counted),
    "an object": lambda: Keeps(Config(), lambda kept: counted(kept.__dict__.setdefault("counts", {"n": 0}))),
    "a callable": lambda: Keeps(Counts(), lambda kept: float(kept())),
    "a bound method": lambda: Keeps(Counts().__call__, lambda kept: float(kept())),
    "an iterator": lambda: Keeps(itertools.count(1), lambda kept: float(next(kept))),
    "an array": lambda: Keeps(np.ones(3), raised),
    "a tensor in a dict": lambda: Keeps({"t": torch.ones(2)}, lambda kept: raised(kept["t"])),
    "a generator of numpy": lambda: Keeps(np.random.default_rng(0), lambda kept: float(kept.random())),
    "an old generator of numpy": lambda: Keeps(np.random.RandomState(0), lambda kept: float(kept.rand())),
    "a generator of Python": lambda: Keeps(random.Random(0), lambda kept: float(kept.random())),
    "a generator in a list": lambda: Keeps(
        [torch.Generator().manual_seed(0)], lambda kept: float(torch.rand((), generator=kept[0]))
    ),
    "batch norm in a list": lambda: Keeps([nn.BatchNorm1d(3, affine=False)], normalised),
    "aliases": Aliases,
}


class ReturnsItsInput(Block):
    def forward(self, x: Tensor) -> Any:
        return {"x": x, "y": super().forward(x), "n": 3, "nothing": None}


class Checkpoints(Block):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        run = super().forward
        x = functional.dropout(x, 0.1)
        return checkpoint(lambda x: functional.dropout(run(x), 0.2), x, use_reentrant=self.use_reentrant)  # type: ignore


class Differentiates(Block):
    """Takes a derivative in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(super().forward(z).square().sum(), z, create_graph=True)
        return x + 0.1 * gradient


class TakesKeywords(Block):
    def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, extra: Any = None) -> Tensor:
        y = super().forward(x * scale)
        return y if mask is None else y * mask + extra["bias"]


class Scaled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / w.norm()


def weight_normed() -> nn.Module:
    block = Block()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block.up)
    nn.utils.parametrize.register_parametrization(block.down, "weight", Scaled())
    return block


class Stack(nn.Module):
    """Blocks, with a loss that uses what they return, whatever that is."""

    def __init__(self, blocks: list[nn.Module], times: int = 1) -> None:
        super().__init__()
        self.first, self.blocks, self.times = nn.Linear(WIDTH, WIDTH), nn.ModuleList(blocks), times

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            for block in self.blocks:
                y = block(x, **more)
                x = y["x"] * 0.5 + y["y"] if isinstance(y, dict) else y
        return x


class RaisesAMaskInPlace(Stack):
    """Changes an argument of its blocks in place after they have run: no operation has saved it."""

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        x, scale = self.first(x), torch.full((1,), 1.0)
        for block in self.blocks:
            x = block(x + scale)
            scale += 1
            h = x * 1.0
            x = block(functional.dropout(h, 0.1))
            with torch.no_grad():
                h.zero_()
        return x


def stack(make: Callable[[], nn.Module], times: int = 1) -> Callable[[], nn.Module]:
    return lambda: Stack([make() for _ in range(3)], times)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "blocks": stack(Block),
    "blocks that are run twice": stack(Block, times=2),
    "batch norm": stack(Normalised),
    "batch norm that counts": stack(lambda: Normalised(None)),
    "dropout": stack(Drops),
    "other generators": stack(DrawsElsewhere),
    "a generator of its own": stack(OwnGenerator),
    "attributes": stack(CountsAndRemembers, times=2),
    "a buffer in place": stack(PowerIteration),
    "an input in place": stack(InPlaceInput),
    "outputs that are inputs": stack(ReturnsItsInput),
    "checkpoints within": stack(lambda: Checkpoints(False)),
    "reentrant checkpoints within": stack(lambda: Checkpoints(True)),
    "a derivative within": stack(Differentiates),
    "computed weights": stack(weight_normed),
    "an argument that is changed later": lambda: RaisesAMaskInPlace([Block() for _ in range(2)]),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def trained(model: Any, steps: int = 3, **how: Any) -> dict[str, Any]:
    """Everything that training leaves behind."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step)).unsqueeze(1).expand(4, WIDTH, WIDTH)
        loss = model(x.contiguous(), **how).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "losses": losses,
        "state": model.state_dict(),
        "draws": (torch.rand(3), random.random(), float(np.random.rand())),
        "attributes": [(getattr(b, "calls", 0), len(getattr(b, "seen", ()))) for b in model.blocks],
        "last": [getattr(b, "last", torch.zeros(())).detach() for b in model.blocks],
    }


def check_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            check_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            check_equal(a, b)
    else:
        assert one == other


@contextmanager
def surroundings(name: str) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16) if name == "autocast" else torch.enable_grad():
        yield


@pytest.mark.parametrize("around", ["nothing", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_training_leaves_the_same_behind(name: str, around: str) -> None:
    plain, model = made(name), made(name)
    recomputing = Recomputing(list(model.blocks))
    with surroundings(around):
        expected = trained(plain)
        found = trained(model)
    check_equal(found, expected)
    if name == "an input in place":
        assert set(recomputing.outcomes) == {"held"}
        assert set(recomputing.reasons) == {"it changes its input in place"}
    else:
        assert recomputing.outcomes[-1] == "dropped"


def recomputed(name: str = "dropout") -> tuple[Any, Any, Tensor]:
    plain, model = made(name), made(name)
    Recomputing(list(model.blocks))
    return plain, model, torch.randn(4, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(model: Any, use: Callable[[Any], None]) -> list[Tensor]:
    torch.manual_seed(2)
    use(model)
    return [p.grad for p in model.parameters()]


def backward_twice(model: Any, x: Tensor) -> None:
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def two_forwards_first(model: Any, x: Tensor) -> None:
    first, second = model(x).square().mean(), model(x + 1).square().mean()
    first.backward()
    second.backward()


def a_part_first(model: Any, x: Tensor) -> None:
    loss = model(x).square().mean()
    torch.autograd.grad(loss, [model.blocks[2].up.weight], retain_graph=True)
    loss.backward()


def derivative_of_a_derivative(model: Any, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    loss = model(x).square().mean()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()


def in_evaluation_before_backward(model: Any, x: Tensor) -> None:
    loss = model(x).square().mean()
    model.eval()
    loss.backward()


def with_attention_kernels_of_its_own(model: Any, x: Tensor) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(x).square().mean()
    loss.backward()


class Attends(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + functional.scaled_dot_product_attention(x, x, x, is_causal=True))


MODELS["attention"] = stack(Attends)
USES = [
    backward_twice,
    two_forwards_first,
    a_part_first,
    derivative_of_a_derivative,
    in_evaluation_before_backward,
    with_attention_kernels_of_its_own,
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["dropout", "attributes", "batch norm", "attention"])
def test_gradients_are_the_same_in_any_order_of_backwards(name: str, use: Callable[[Any, Tensor], None]) -> None:
    plain, model, x = recomputed(name)
    expected = gradients(plain, lambda model: use(model, x))
    assert all(map(torch.equal, gradients(model, lambda model: use(model, x)), expected))


def test_nothing_but_copies_of_inputs_is_held_between_forward_and_backward() -> None:
    _, model, x = recomputed("blocks")
    made: list[ReferenceType[Any]] = []
    see = Attached(lambda module, args, output: made.append(ref(output.untyped_storage())))
    model.blocks[1].up.register_forward_hook(see)
    loss = model(x).square().mean()
    assert made[0]() is None
    loss.backward()


def test_a_graph_that_nobody_runs_backward_takes_its_copies_along() -> None:
    _, model, x = recomputed("attributes")
    before = set(Here.alive)
    losses = [model(x).square().mean() for _ in range(3)]
    assert len(set(Here.alive) - before) >= 9
    del losses
    for block in model.blocks:
        block.last, block.seen = torch.zeros(()), []
    assert set(Here.alive) <= before


def test_what_was_saved_can_move_when_the_forward_is_over() -> None:
    visit = RecomputedVisit("h.0", nn.Linear(2, 2), (torch.ones(2),), {})
    saved = visit.save(torch.ones(3), keep=Here)
    visit.hold()
    saved.move(lambda tensor: Here(tensor + 1))
    assert torch.equal(saved.unpack(), torch.full((3,), 2.0))


TURNS: list[int] = []


class Alternates(Block):
    """Depends on a list that no attribute holds."""

    def forward(self, x: Tensor) -> Tensor:
        TURNS.append(1)
        return super().forward(x).exp() if len(TURNS) % 2 else x * TURNS[-1] * self.up.weight.sum()


def test_a_forward_that_does_something_else_the_second_time_is_told_of() -> None:
    TURNS.clear()
    model = Stack([Alternates()])
    Recomputing(list(model.blocks))
    loss = model(torch.randn(2, WIDTH)).sum()
    with pytest.raises(RuntimeError, match=r"block: its forward ran again in backward and saved other tensors"):
        loss.backward()


def test_an_argument_that_hides_what_is_in_it_keeps_a_block_from_running_again() -> None:
    model = Stack([TakesKeywords()])
    recomputing = Recomputing(list(model.blocks))
    mask, bias = torch.ones(WIDTH), torch.zeros(WIDTH)
    model(torch.randn(2, WIDTH), mask=mask, extra={"bias": bias}).sum().backward()
    assert recomputing.outcomes == ["dropped"]

    class Cache(dict[str, Tensor]):
        pass

    model(torch.randn(2, WIDTH), mask=mask, extra=Cache(bias=bias)).sum().backward()
    assert recomputing.outcomes[-1] == "held"
    assert recomputing.reasons == ["it is given a Cache, which it may change"]


@pytest.mark.parametrize("name", DEEP)
def test_a_block_that_changes_what_is_deep_in_its_attributes_is_kept(name: str) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(stack(DEEP[name])())
    plain, model = models
    recomputing = Recomputing(list(model.blocks))
    check_equal(trained(model), trained(plain))
    assert set(recomputing.outcomes) == {"held"}


def test_a_block_with_an_object_that_stays_as_it_is_runs_again() -> None:
    plain, model = (stack(lambda: Keeps(Config(), lambda kept: float(kept.scale)))() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    recomputing = Recomputing(list(model.blocks))
    x, found = torch.randn(2, WIDTH), []
    for each in (plain, model):
        losses = []
        for scale in (1.0, 2.0):  # the program's change is no obstacle
            for block in each.blocks:  # type: ignore[union-attr]
                block.kept.scale = scale
            losses.append(each(x).square().mean())
        sum(losses).backward()
        found.append([p.grad for p in each.parameters()])
        assert all(block.kept.scale == 2.0 for block in each.blocks)  # type: ignore[union-attr]
    check_equal(*found)
    assert set(recomputing.outcomes) == {"dropped"}


class Changes(Block):
    """Changes a buffer, or what it is given, in a way that raises no version."""

    n: Tensor

    def __init__(self, change: Callable[[Any, Tensor], None], size: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(size))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        return super().forward(x + self.n[-1])


def through_data(block: Any, x: Tensor) -> None:
    block.n.data.mul_(0.9).add_(x.detach().mean())


def through_numpy(block: Any, x: Tensor) -> None:
    block.n.numpy()[-1] += 1


def by_another_memory(block: Any, x: Tensor) -> None:
    block.n.data = block.n.data + 1


def as_running_mean(block: Any, x: Tensor) -> None:
    functional.batch_norm(x.flatten(0, -2), block.n, block.n + 1, training=True)


def the_input(block: Any, x: Tensor) -> None:
    x.data.mul_(1.5)


def a_view_of_it(block: Any, x: Tensor) -> None:
    block.view.add_(1)


@pytest.mark.parametrize(
    "change", [through_data, through_numpy, by_another_memory, as_running_mean, the_input, a_view_of_it]
)
def test_a_change_of_small_values_that_raises_no_version_is_seen(change: Callable[[Any, Tensor], None]) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(stack(lambda: Changes(change))())
        for block in models[-1].blocks:  # type: ignore[union-attr]
            block.view = block.n[1:]
    plain, model = models
    recomputing = Recomputing(list(model.blocks))
    check_equal(trained(model), trained(plain))
    assert recomputing.outcomes[:3] == ["held"] * 3


def a_weight(block: Any) -> None:
    with torch.no_grad():
        block.up.weight.mul_(1.1)


def a_bias(block: Any) -> None:
    with torch.no_grad():
        block.up.bias.add_(0.1)


def a_buffer(block: Any) -> None:
    block.n.fill_(1.0)


def another_parameter(block: Any) -> None:
    block.up.bias = nn.Parameter(torch.ones(4 * WIDTH))


def another_module(block: Any) -> None:
    block.norm = nn.Identity()


def another_method(block: Any) -> None:
    block.forward = lambda x: x


def a_hook(block: Any) -> None:
    block.up.register_forward_hook(lambda module, args, output: output * 2)


BETWEEN = {
    a_weight: r"modified by an inplace operation: Linear\.weight",
    a_bias: r"modified by an inplace operation: Linear\.bias",
    a_buffer: r"modified by an inplace operation: Changes\.n",
    another_parameter: r"have been replaced: Linear\.bias",
    another_module: r"have been replaced: Changes\.norm",
    another_method: r"have been replaced: Changes\.forward",
    a_hook: r"a forward hook of its Linear would be called again",
}


@pytest.mark.parametrize("change", BETWEEN)
def test_what_the_program_changes_between_forward_and_backward_is_told(change: Callable[[Any], None]) -> None:
    model = Stack([Changes(lambda block, x: None)])
    recomputing = Recomputing(list(model.blocks))
    loss = model(torch.randn(2, WIDTH)).sum()
    assert recomputing.outcomes == ["dropped"]
    change(model.blocks[0])
    with pytest.raises(RuntimeError, match=BETWEEN[change]):
        loss.backward()


class Observed:
    """What a block is given a method of."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def see(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return torch.stack(self.seen).mean(0)


class CallsBack(Block):
    def forward(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        return super().forward(x + call(x))


def test_a_block_that_is_given_a_method_of_an_object_is_kept() -> None:
    block = CallsBack()
    recomputing = Recomputing([block])
    block(torch.randn(2, WIDTH), Observed().see)
    block(torch.randn(2, WIDTH), torch.sigmoid)
    assert recomputing.reasons == ["it is given a method of a Observed, which it may change"]
    assert recomputing.outcomes == ["held", "dropped"]


def test_tensors_in_the_place_of_parameters_and_hooks_on_all_modules_are_seen() -> None:
    block, x, reasons = Block(), torch.randn(2, WIDTH), []
    block.norm.register_forward_hook(Attached(lambda *_: reasons.append(why_not(block))))
    torch.func.functional_call(block, {"up.bias": torch.ones(4 * WIDTH)}, (x,))
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    block(x)
    hook.remove()
    block(x)
    assert [reason and reason.text for reason in reasons] == [
        "other tensors took the place of its parameters for the call",
        "a forward hook on all modules would be called again",
        None,
    ]
