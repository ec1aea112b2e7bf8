"""What leaves, what stays, and that a graph gets back what it saved."""

import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Task, check_parity
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 64
_VERSIONS = ", is at version 1; expected version 0 instead. Hint: enable anomaly detection"


class Runs(nn.Module):
    """A parameter, so that there is something to train, and a function of the test's."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH).tril())
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def offloaded(model: nn.Module, folder: Path, **plugin: Any) -> Any:
    booster = Booster(
        plugin=GeminiPlugin(
            precision="fp32", offload_dir=folder, activation_policy="offload", telemetry=False, **plugin
        )
    )
    return booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))[0]


def data(seed: int = 3) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))


def let_leave(model: Any) -> dict[str, Any]:
    """Have all leave that can, and its copies end."""
    store = boosted(model).saving._store
    store.settle()
    store._returns.arrived_below(store._departures.finish(wait=True))
    return model.memory_stats()  # type: ignore[no-any-return]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same_gradients(run: Callable[..., Any], folder: Path, between: Callable[[Any], None] = lambda model: None) -> Any:
    """One forward and backward equal those of a plain model; the boosted one comes back."""
    plain, model = Runs(run), offloaded(Runs(run), folder)
    expected = gradients(plain, plain(data()).square().sum())
    loss = model(data()).square().sum()
    let_leave(model)
    between(model)
    found = gradients(model, loss)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    return model


def test_nothing_of_ours_sees_what_is_saved_with_the_default_policy() -> None:
    seen = []

    def run(model: Runs, x: Tensor) -> Tensor:
        seen.append(torch._C._autograd._top_saved_tensors_default_hooks(True))
        return (x * model.scale).sin()

    model = Runs(run)
    model, *_ = Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, HybridAdam(model.parameters()))
    model(data()).sum().backward()
    assert seen == [None]
    assert model.memory_stats()["activation/saved_bytes"] == 0


def test_views_and_results_that_share_memory_leave_once_and_come_back_sharing(tmp_path: Path) -> None:
    together: list[Tensor] = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x, x[2:].t(), x[:, ::2], x[:1].expand(5, -1), x.view(-1))
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            together.extend(ctx.saved_tensors)
            return gradient * 2

    model = same_gradients(lambda m, x: Looks.apply((x * m.scale).sin()), tmp_path)
    plain, ours = together[:5], together[5:]
    for ours_one, plain_one in zip(ours, plain, strict=True):
        assert torch.equal(ours_one, plain_one)
        assert ours_one.stride() == plain_one.stride()
        assert ours_one.storage_offset() == plain_one.storage_offset()
        assert ours_one.requires_grad == plain_one.requires_grad
    assert len({view.untyped_storage().data_ptr() for view in ours}) == 1
    assert model.memory_stats()["activation/leave_count"] == 3  # what sin and square have saved besides


def test_parameters_buffers_and_what_the_program_holds_stay(tmp_path: Path) -> None:
    constant = torch.randn(WIDTH, WIDTH)
    held: list[Tensor] = []

    def run(model: Runs, x: Tensor) -> Tensor:
        x = x @ (model.scale[:, None] * model.mask)  # saves the buffer and what is made of it
        held.append(x.sin())  # saves x
        return (held[0] @ constant).square()

    model = offloaded(Runs(run), tmp_path)
    model(data()).sum()
    stats = let_leave(model)
    x = model(data())  # the former graph is gone: so has what it had on disk
    del x
    assert stats["activation/leave_bytes"] > 0
    for tensor in (model.mask, constant, held[0]):
        known = boosted(model).saving._store._known
        storage = tensor.untyped_storage()
        assert [s for s in known.values() if s.memory is storage and s.room is not None] == []


@pytest.mark.parametrize("change", [lambda t: t.add_(1), lambda t: t[0].zero_(), lambda t: t.t().mul_(2)])
def test_a_saved_tensor_that_is_changed_in_place_raises_the_error_of_torch(
    change: Callable[[Tensor], Any], tmp_path: Path
) -> None:
    kept: list[Tensor] = []

    def run(model: Runs, x: Tensor) -> Tensor:
        kept.append((x * model.scale).exp())
        return kept[-1].sin()

    def message(model: nn.Module) -> str:
        loss = model(data()).sum()
        with torch.no_grad():
            change(kept[-1])
        with pytest.raises(RuntimeError) as raised:
            loss.backward()
        return str(raised.value)

    expected = message(Runs(run))
    model = offloaded(Runs(run), tmp_path)
    found = message(model)
    for text in ("modified by an inplace operation: [torch.FloatTensor [8, 64]], which is output 0 of Exp", _VERSIONS):
        assert text in expected
        assert text in found
    model.run = lambda model, x: (x * model.scale).sin()
    model(data()).sum().backward()


def test_a_change_in_place_that_torch_allows_is_seen_by_backward(tmp_path: Path) -> None:
    def run(model: Runs, x: Tensor) -> Tensor:
        y = (x * model.scale).exp()
        z = y.sin()
        y.data.mul_(2)  # behind autograd's back: backward uses what is there then
        return z

    same_gradients(run, tmp_path)


def test_what_backward_changes_in_place_fails_a_second_backward_as_in_torch(tmp_path: Path) -> None:
    class Spoils(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradient * x.mul_(2)

    for model in (Runs(_spoiled(Spoils)), offloaded(Runs(_spoiled(Spoils)), tmp_path)):
        loss = model(data()).sum()
        if model.__class__ is not Runs:
            let_leave(model)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def _spoiled(function: Any) -> Callable[..., Tensor]:
    return lambda model, x: function.apply(x * model.scale)


def test_a_graph_that_is_kept_can_be_used_again_and_again(tmp_path: Path) -> None:
    def run(model: Runs, x: Tensor) -> Tensor:
        for _ in range(6):
            x = (x * model.scale).sin()
        return x

    plain, model = Runs(run), offloaded(Runs(run), tmp_path)
    losses = [plain(data()).square().sum(), model(data()).square().sum()]
    let_leave(model)
    for _ in range(3):
        both = [
            torch.autograd.grad(loss, m.scale, retain_graph=True)[0]
            for m, loss in zip((plain, model), losses, strict=True)
        ]
        assert torch.equal(*both)
    first = [
        torch.autograd.grad(loss, m.scale, create_graph=True)[0] for m, loss in zip((plain, model), losses, strict=True)
    ]
    second = [torch.autograd.grad(g.square().sum(), m.scale)[0] for m, g in zip((plain, model), first, strict=True)]
    assert torch.equal(*second)
    del losses, first
    boosted(model).saving.rest(10.0)
    assert boosted(model).saving.counts.disk_bytes == 0


def test_what_was_used_leaves_again_while_its_graph_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Runs, x: Tensor) -> Tensor:
        for _ in range(8):
            x = (x * model.scale).sin()
        return x

    model = offloaded(Runs(run), tmp_path)
    monkeypatch.setattr(boosted(model).saving._store._returns, "_limit_bytes", 2 * data().nbytes)
    loss = model(data()).square().sum()
    let_leave(model)
    loss.backward(retain_graph=True)
    known = [saved for saved in boosted(model).saving._store._known.values() if saved.room is not None]
    here = sum(saved.nbytes for saved in known if saved.memory is not None)
    assert len(known) >= 14
    assert here <= 6 * data().nbytes
    loss.backward()


def test_a_graph_that_is_dropped_gives_its_room_back(tmp_path: Path) -> None:
    model = offloaded(Runs(lambda model, x: (x * model.scale).sin().cos()), tmp_path)
    loss = model(data()).sum()
    assert let_leave(model)["activation/disk_bytes"] > 0
    del loss
    boosted(model).saving.rest(10.0)
    assert model.memory_stats()["activation/disk_bytes"] == 0
    assert model.memory_stats()["disk/used_bytes"] == 0


def test_a_graph_outlives_its_model(tmp_path: Path) -> None:
    plain, model = (Runs(lambda model, x: (x * 2).exp() * model.scale) for _ in range(2))
    model = offloaded(model, tmp_path)
    inputs = [data().requires_grad_(True) for _ in range(2)]
    losses = [m(x).sum() for m, x in zip((plain, model), inputs, strict=True)]
    let_leave(model)
    gone = weakref.ref(model)
    model.scale.requires_grad_(False)
    del model
    gc.collect()
    if gone() is None:  # else the graph keeps the parameter, and that the model's memory
        both = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, inputs, strict=True)]
        assert torch.equal(*both)


def test_a_model_that_keeps_a_graph_is_collected(tmp_path: Path) -> None:
    class Keeps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x).sin()
            return self.last * 2

    model = offloaded(Keeps(WIDTH, WIDTH), tmp_path)
    model(data())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_exception_in_forward_and_in_backward_leaves_nothing_behind(tmp_path: Path) -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ArithmeticError("in backward")

    def run(model: Runs, x: Tensor) -> Tensor:
        x = (x * model.scale).sin().cos()
        if fails == "forward":
            raise ArithmeticError("in forward")
        return (Raises.apply(x) if fails == "backward" else x).exp()

    model = offloaded(Runs(run), tmp_path)
    for fails in ("forward", "backward"):
        with pytest.raises(ArithmeticError, match=fails):
            model(data()).sum().backward()
    fails = ""
    model(data()).sum().backward()
    gc.collect()
    boosted(model).saving.rest(10.0)
    assert boosted(model).saving.counts.disk_bytes == 0


def test_hooks_of_the_user_within_the_model_and_around_it_are_asked(tmp_path: Path) -> None:
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel())
        return tensor.detach() * 2  # a trace in the numbers

    def run(model: Runs, x: Tensor) -> Tensor:
        x = (x * model.scale).exp()
        with saved_tensors_hooks(pack, lambda t: t):
            x = x.sin()
        return x.cos()

    same_gradients(run, tmp_path)
    for around in (save_on_cpu(), saved_tensors_hooks(pack, lambda t: t)):
        plain, model = (Runs(lambda model, x: (x * model.scale).exp().sin()) for _ in range(2))
        model = offloaded(model, tmp_path)
        packed.clear()
        with around:
            expected = gradients(plain, plain(data()).sum())
        count = len(packed)
        with around:
            found = gradients(model, model(data()).sum())
        assert len(packed) == 2 * count
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert model.memory_stats()["activation/saved_bytes"] == 0


def test_hooks_that_are_forbidden_around_the_model_are_not_used(tmp_path: Path) -> None:
    model = offloaded(Runs(lambda model, x: (x * model.scale).sin()), tmp_path)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        model(data()).sum().backward()


def test_a_transform_within_the_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    def run(model: Runs, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (x * model.scale.detach()).sin().sum())(x) * model.scale

    model = offloaded(Runs(run), tmp_path)
    with pytest.raises(RuntimeError, match="activation_policy='keep'"):
        model(data())
    model.run = lambda model, x: torch.vmap(lambda row: (row * model.scale).sin())(x)
    model(data()).sum().backward()


def odd_tensors(model: Runs, x: Tensor) -> Tensor:
    x = x * model.scale
    complex_one = torch.complex(x, x * 2)
    y = (complex_one.conj() * complex_one * complex_one.imag.neg()).real.abs()
    sparse = torch.eye(8).to_sparse()
    y = y + torch.sparse.mm(sparse, x.exp())
    empty = x[:0].sin().sum() + x.mean().sin()
    return y.double().sin().float() + empty + torch.from_numpy(x.detach().numpy() * 2) * x


def test_tensors_of_all_kinds_come_back_as_they_were(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: sparse layouts are beta
        same_gradients(odd_tensors, tmp_path)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inputs_of_checkpoints_leave(use_reentrant: bool, tmp_path: Path) -> None:
    def run(model: Runs, x: Tensor) -> Tensor:
        x = x * model.scale
        for _ in range(4):
            x = checkpoint(lambda x: (x * model.scale).exp().sin(), x, use_reentrant=use_reentrant)  # type: ignore[assignment]
        return x

    model = same_gradients(run, tmp_path)
    assert model.memory_stats()["activation/leave_count"] >= 4


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many of its own
def test_compiled_blocks_save_as_before(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    def compile_blocks(model: nn.Module) -> None:
        for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
            model.blocks[i] = torch.compile(block, backend="aot_eager")  # type: ignore[index]

    task = Task(Model, [data(i) for i in range(3)], lambda m, x: m(x).square().sum(), prepare=compile_blocks)
    model = check_parity(task, offload_dir=tmp_path, activation_policy="offload")
    assert model.memory_stats()["activation/leave_count"] > 0


def test_backward_in_another_thread(tmp_path: Path) -> None:
    def elsewhere(model: Any) -> None:
        threads = [threading.Thread(target=lambda: model(data(9)).sum().backward()) for _ in range(1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        let_leave(model)

    same_gradients(lambda model, x: (x * model.scale).sin().exp(), tmp_path, elsewhere)


def test_a_forked_child_is_told(tmp_path: Path) -> None:
    model = offloaded(Runs(lambda model, x: (x * model.scale).sin().exp()), tmp_path)
    loss = model(data()).sum()
    let_leave(model)
    pid = os.fork()
    if pid == 0:
        try:
            loss.backward()
        except BaseException as error:
            os._exit(3 if "fork" in str(error) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    loss.backward()
