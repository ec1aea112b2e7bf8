"""What any optimizer of PyTorch can do, tried with `HybridAdam` on its own and boosted.

The topics are those of PyTorch's generic optimizer tests (``torch.testing._internal.common_optimizers``).
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from state_uses import same
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

SHAPES = ((16, 4), (32,), (2, 8, 4))


class Holder(nn.Module):
    """Parameters whose gradients tests set by hand; the loss is small where they are."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self) -> Tensor:
        return torch.stack([p.square().sum() for p in self.held]).sum()


class Run:
    """Some parameters and their optimizer: torch's, ours, or ours boosted."""

    def __init__(self, kind: str, groups: Callable[[list[nn.Parameter]], Any], **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        self.model = Holder(self.parameters)
        self.kind = kind
        if kind == "torch":
            self.optimizer: Any = torch.optim.AdamW(
                groups(self.parameters), fused=True, **{"weight_decay": 0.0, **options}
            )
        else:
            self.optimizer = HybridAdam(groups(self.parameters), **options)
        if kind == "boosted":
            plugin = GeminiPlugin(precision="fp32", telemetry=False, chunk_config_dict={1: {"chunk_size": 64}})
            self.model, self.optimizer, *_ = Booster(plugin=plugin).boost(self.model, self.optimizer)

    def give(self, step: int, of: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in self.parameters:
            p.grad = of(torch.randn(p.shape, generator=generator))

    def step(self, number: int) -> None:
        self.give(number)
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]


@pytest.fixture(params=["ours", "boosted"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def one(parameters: list[nn.Parameter]) -> Any:
    return parameters


def two(parameters: list[nn.Parameter]) -> Any:
    return [{"params": parameters[:1], "lr": 3e-3}, {"params": parameters[1:], "weight_decay": 0.3}]


def pair(kind: str, groups: Callable[[list[nn.Parameter]], Any] = one, **options: Any) -> tuple[Run, Run]:
    return Run(kind, groups, **options), Run("torch", groups, **options)


def check(ours: Run, theirs: Run) -> None:
    assert same(ours.values(), theirs.values())
    assert same(ours.optimizer.state_dict()["state"], theirs.optimizer.state_dict()["state"])


INPUTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.01},
    "no lr": {"lr": 0.0, "weight_decay": 0.1},
    "lr in a tensor": {"lr": torch.tensor(0.001)},
    "betas": {"betas": (0.95, 0.998)},
    "no first beta": {"betas": (0.0, 0.95), "eps": 1e-6},
    "weight decay": {"weight_decay": 0.1},
    "weight decay in a tensor": {"weight_decay": torch.tensor(0.1)},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("groups", [one, two])
def test_pytorchs_options_give_pytorchs_numbers(given: dict[str, Any], groups: Any, kind: str) -> None:
    ours, theirs = pair(kind, groups, **copy.deepcopy(given))
    for number in range(4):
        for run in (ours, theirs):
            run.step(number)
    check(ours, theirs)


@pytest.mark.parametrize("given", [{"lr": -0.5}, {"betas": (1.0, 0.0)}, {"weight_decay": -1}, {"eps": -1e-30}], ids=str)
def test_options_out_of_range_are_refused_where_torch_refuses_them(given: dict[str, Any]) -> None:
    for cls in (torch.optim.AdamW, HybridAdam):
        with pytest.raises(ValueError):
            cls([nn.Parameter(torch.ones(2))], **given)


def test_parameters_in_wrong_containers_are_refused_in_torchs_words() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for given, error, message in (
        (p, TypeError, "iterable of Tensors or dicts"),
        ([], ValueError, "empty parameter list"),
        ([0, 2], TypeError, "can only optimize Tensors"),
        ([{"params": {p, q}}], TypeError, "ordered collections"),
        ([p * 2], ValueError, "non-leaf"),
        ([{"params": [p]}, {"params": [q, p]}], ValueError, "more than one parameter group"),
        ([("p", p), q], ValueError, "with/without names"),
    ):
        for cls in (torch.optim.AdamW, HybridAdam):
            with pytest.raises(error, match=message):
                cls(given)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        HybridAdam([p, p])


def test_a_group_that_has_parameters_already_is_refused_when_it_is_added(kind: str) -> None:
    run = Run(kind, one)
    with pytest.raises(ValueError, match="more than one parameter group"):
        run.optimizer.add_param_group({"params": [run.parameters[0]]})
    assert len(run.optimizer.param_groups) == 1


def test_a_learning_rate_may_be_a_tensor_that_changes_in_place(kind: str) -> None:
    ours, theirs = (Run(k, two, lr=torch.tensor(0.01)) for k in (kind, "torch"))
    for number in range(4):
        for run in (ours, theirs):
            run.step(number)
            run.optimizer.param_groups[1]["lr"].mul_(0.5)
    check(ours, theirs)


def plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def sequence(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": sequence,
    "ReduceLROnPlateau": plateau,
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_and_load_their_state(name: str, kind: str) -> None:
    ours, theirs = pair(kind, two)
    schedulers = [SCHEDULERS[name](run.optimizer) for run in (ours, theirs)]
    for number in range(8):
        for i, run in enumerate((ours, theirs)):
            run.step(number)
            schedulers[i].step(*([1.0] if name == "ReduceLROnPlateau" else []))
            if number == 4:
                saved = copy.deepcopy((run.optimizer.state_dict(), schedulers[i].state_dict()))
                run.optimizer.state.clear()
                schedulers[i] = SCHEDULERS[name](run.optimizer)
                run.optimizer.load_state_dict(saved[0])
                schedulers[i].load_state_dict(saved[1])
        assert [[g["lr"], g["betas"]] for g in ours.optimizer.param_groups] == [
            [g["lr"], g["betas"]] for g in theirs.optimizer.param_groups
        ]
    check(ours, theirs)


def test_a_closure_runs_once_with_gradients_and_its_loss_comes_back(kind: str) -> None:
    ours, theirs = pair(kind)
    for _ in range(3):
        losses = []
        for run in (ours, theirs):

            def closure(run: Run = run) -> Tensor:
                run.optimizer.zero_grad()
                assert torch.is_grad_enabled()
                loss = run.model()
                loss.backward()
                return loss

            losses.append(run.optimizer.step(closure).item())
        assert losses[0] == losses[1]
    assert ours.optimizer.step() is None
    theirs.optimizer.step()
    check(ours, theirs)


def test_hooks_around_steps_see_and_change_arguments(kind: str) -> None:
    seen: list[Any] = []

    def before(optimizer: Any, args: Any, kwargs: Any) -> Any:
        seen.append(("before", len(args), sorted(kwargs)))
        return (optimizer,), {"closure": lambda: 7}

    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append(("after", len(args), sorted(kwargs), len(optimizer.state)))

    run = Run(kind, one)
    handles = [run.optimizer.register_step_pre_hook(before), run.optimizer.register_step_post_hook(after)]
    everywhere = register_optimizer_step_post_hook(lambda *_: seen.append("global"))
    try:
        run.give(0)
        assert run.optimizer.step() == 7
    finally:
        everywhere.remove()
    assert seen == [("before", 1, []), ("after", 1, ["closure"], 3), "global"]
    for handle in handles:
        handle.remove()
    run.step(1)
    assert len(seen) == 3
    run.optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        run.step(2)


def test_gradients_of_any_layout_give_the_same_numbers(kind: str) -> None:
    def transposed(gradient: Tensor) -> Tensor:
        return gradient.transpose(0, -1).contiguous().transpose(0, -1)

    def strided(gradient: Tensor) -> Tensor:
        return torch.stack([gradient, -gradient], dim=-1)[..., 0]

    for of in (transposed, strided, lambda gradient: gradient[..., :1].expand(gradient.shape)):
        ours, theirs = pair(kind)
        for number in range(3):
            for run in (ours, theirs):
                run.give(number, of if run is ours else lambda gradient, of=of: of(gradient).contiguous())
                run.optimizer.step()
        check(ours, theirs)


def test_parameters_without_gradient_and_empty_ones_are_left_alone(kind: str) -> None:
    ours, theirs = pair(kind, weight_decay=0.1)
    for run in (ours, theirs):
        run.optimizer.step()  # none has one
        run.step(0)
        run.parameters[1].requires_grad_(False)
        run.give(1)
        run.parameters[0].grad = None
        run.optimizer.step()
        run.optimizer.add_param_group({"params": []})
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.empty(0, 3))]})
        run.optimizer.param_groups[2]["params"][0].grad = torch.empty(0, 3)
        run.optimizer.step()
    check(ours, theirs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_gradients_are_none_or_zeros(set_to_none: bool, kind: str) -> None:
    ours, theirs = pair(kind, weight_decay=0.1)
    for run in (ours, theirs):
        run.step(0)
        run.give(1)
        run.optimizer.zero_grad(set_to_none)
        assert [p.grad is None or not p.grad.any().item() for p in run.parameters] == [True] * 3
        assert [p.grad is None for p in run.parameters] == [set_to_none] * 3
        run.optimizer.step()
    check(ours, theirs)


def test_state_dicts_go_round_through_copies_files_and_other_groups(kind: str) -> None:
    ours, theirs = pair(kind, two)
    for run in (ours, theirs):
        run.step(0)
    found, expected = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert same(found["state"], expected["state"])
    assert list(found["state"][0]) == list(expected["state"][0])
    assert [g["params"] for g in found["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    for saved in (copy.deepcopy(found), torch.load(file, weights_only=True), pickle.loads(pickle.dumps(found))):
        assert same(saved, found)
        for group in saved["param_groups"]:
            group["lr"], group["fused"] = 0.02, True  # ours does without, and torch's other forms are 1 ulp away
            group["extra"] = ["kept"]
        for state in saved["state"].values():
            state["exp_avg"] = state["exp_avg"].double() * 0.5  # loading casts to what the optimizer keeps
        other = copy.deepcopy(saved)
        for run in (ours, theirs):
            run.optimizer.load_state_dict(copy.deepcopy(saved))
            assert run.optimizer.state[run.parameters[0]]["exp_avg"].dtype == torch.float32
            assert run.optimizer.param_groups[0]["extra"] == ["kept"]
            run.step(3)
        assert same(saved, other)
    check(ours, theirs)
    for wrong in ({**found, "param_groups": found["param_groups"][:1]}, Run("torch", one).optimizer.state_dict()):
        for run in (ours, theirs):
            with pytest.raises(ValueError, match=r"group"):
                run.optimizer.load_state_dict(wrong)
    check(ours, theirs)


def test_states_that_a_loaded_dict_does_not_have_are_gone(kind: str) -> None:
    ours, theirs = pair(kind)
    for run in (ours, theirs):
        empty = copy.deepcopy(run.optimizer.state_dict())
        run.step(0)
        some = copy.deepcopy(run.optimizer.state_dict())
        del some["state"][1]
        for saved, left in ((some, 2), (empty, 0)):
            run.optimizer.load_state_dict(saved)
            assert len(run.optimizer.state) == left
            run.step(1)
    check(ours, theirs)


def test_it_can_be_printed_with_the_options_of_each_group(kind: str) -> None:
    ours, theirs = pair(kind, two)
    lines = repr(ours.optimizer).splitlines()
    assert lines[0] == "HybridAdam ("
    assert {line for line in repr(theirs.optimizer).splitlines()[1:] if "fused" not in line} <= set(lines)


def test_copies_and_pickles_of_an_unmanaged_one_go_on_alone() -> None:
    ours, theirs = pair("ours", two)
    for run in (ours, theirs):
        run.step(0)
    twin = pickle.loads(pickle.dumps(ours.optimizer))
    deep = copy.deepcopy(ours.optimizer)
    for optimizer in (twin, deep):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert same([dict(optimizer.state[p]) for p in parameters], list(theirs.optimizer.state.values()))
        generator = torch.Generator().manual_seed(1)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    check(ours, theirs)
    theirs.step(1)
    for optimizer in (twin, deep):
        assert same([p.detach() for group in optimizer.param_groups for p in group["params"]], theirs.values())


def test_a_parameter_that_moves_to_another_group_has_its_options(kind: str) -> None:
    ours, theirs = pair(kind, two)
    for run in (ours, theirs):
        run.step(0)
        first, second = run.optimizer.param_groups
        second["params"].append(first["params"].pop())
        run.step(1)
        first["params"].append(second["params"].pop(0))
        run.step(2)
        taken = second["params"].pop()
        run.step(3)
        assert taken in run.optimizer.state
    check_values = [run.values() for run in (ours, theirs)]
    assert same(*check_values)


def test_complex_parameters_and_sparse_gradients_are_refused(kind: str) -> None:
    with pytest.raises(TypeError, match="view_as_real"):
        HybridAdam([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    run = Run(kind, one)
    before = run.values()
    run.give(0)
    with pytest.raises(TypeError, match="sparse"):
        run.parameters[0].grad = torch.ones(16, 4).to_sparse()
        run.optimizer.step()
    assert same(run.values(), before)
