"""Other people's optimizers are accepted by the names of their classes: here by stand-ins of the same names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from other_optimizers import Other
from torch import nn
from torch.optim import Optimizer

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread")]


def named(module: str, name: str) -> Any:
    """Give a class the name of another package's."""

    def rename(cls: Any) -> Any:
        cls.__module__, cls.__qualname__, cls.__name__ = module, name, name
        return cls

    return rename


@named("timm.optim.adan", "Adan")
class CountsInGroup(Optimizer):
    """Counts its steps in the group, and has the gradient before as a state, as timm's Adan."""

    def __init__(self, params: Any, lr: float = 1e-2, caution: bool = False, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.98, 0.92), "eps": eps, "weight_decay": 0.1, "caution": caution})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    for name in ("exp_avg", "exp_avg_sq", "exp_avg_diff"):
                        state[name] = torch.zeros_like(p)
                    state["neg_pre_grad"] = -p.grad.clone()
                change = state["neg_pre_grad"].add_(p.grad)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_diff"].lerp_(change, 1 - beta2)
                state["exp_avg_sq"].mul_(beta1).addcmul_(p.grad, p.grad, value=1 - beta1)
                denominator = (state["exp_avg_sq"] / (1 - beta1 ** group["step"])).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"] + state["exp_avg_diff"], denominator, value=-group["lr"])
                state["neg_pre_grad"].copy_(p.grad).neg_()


@named("adan_pytorch.adan", "Adan")
class CountsWithInt(Optimizer):
    """Its state has the step as an int, whose powers are other numbers than those of a float32 tensor."""

    def __init__(self, params: Any, lr: float = 1e-2, restart_cond: Any = None) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.02, 0.08), "weight_decay": 0.0, "restart_cond": restart_cond})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, grad = self.state[p], p.grad.data
                if not state:
                    state["step"] = 0
                    for name in ("prev_grad", "m", "v", "n"):
                        state[name] = torch.zeros_like(grad)
                state["step"] += 1
                state["m"].mul_(1 - group["betas"][0]).add_(grad, alpha=group["betas"][0])
                correct = 1 / (1 - (1 - group["betas"][0]) ** state["step"])
                state["n"].mul_(0.99).add_(grad**2, alpha=0.01)
                p.data.addcdiv_(state["m"] * correct, state["n"].sqrt().add_(1e-8), value=-group["lr"])


@named("timm.optim.nadamw", "NAdamW")
class MayClip(Optimizer):
    """Scales updates by their size, where that is above a threshold."""

    def __init__(self, params: Any, lr: float = 1e-2, clipping_threshold: Any = None) -> None:
        super().__init__(params, {"lr": lr, "clipping_threshold": clipping_threshold})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state.setdefault("step", torch.tensor(0.0)).add_(1)
                state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad * p.grad, 0.1)
                p.add_(state["exp_avg"], alpha=-group["lr"])


class Named(Other):
    """The loop of `Other` with one of these classes."""

    def __init__(self, cls: Any, placement: dict[str, Any] | None) -> None:
        self.cls = cls
        super().__init__("", placement)

    def make_optimizer(self, model: nn.Module) -> Any:
        parameters = list(model.parameters())
        return self.cls([{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 3e-3}])


@pytest.mark.parametrize("cls", [CountsInGroup, CountsWithInt], ids=["counts in the group", "counts with an int"])
def test_they_have_their_bits_and_their_state_dicts(cls: Any, tmp_path: Path) -> None:
    straight = Named(cls, None)
    losses = [straight.step(step) for step in range(5)]
    ours = Named(cls, {"host_memory": "640KiB", "offload_dir": tmp_path})
    assert [ours.step(step) for step in range(3)] == losses[:3]
    ours.booster.save(tmp_path / "run", model=ours.model, optimizer=ours.optimizer)

    again = Named(cls, {})
    again.booster.load(tmp_path / "run", model=again.model, optimizer=again.optimizer)
    assert again.step(3) == losses[3]
    plain = Named(cls, None)
    plain.model.load_state_dict({name: value.clone() for name, value in again.weights().items()})
    plain.optimizer.load_state_dict(again.optimizer.state_dict())
    assert [run.step(4) for run in (again, plain)] == [losses[4]] * 2
    found, expected = again.optimizer.state_dict(), straight.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for index, state in expected["state"].items():
        mine = found["state"][index]
        assert mine.keys() == state.keys()
        assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(value)) for name, value in state.items())
        assert type(mine.get("step")) is type(state.get("step"))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (MayClip, {"clipping_threshold": 100.0}),  # a trial with small gradients would not see it
        (CountsInGroup, {"caution": True}),
        (CountsWithInt, {"restart_cond": lambda state: False}),
    ],
)
def test_options_that_look_at_the_whole_tensor_are_refused(cls: Any, options: dict[str, Any]) -> None:
    model = nn.Linear(4, 4)
    booster = Booster(plugin=GeminiPlugin(telemetry=False))
    (option,) = options
    with pytest.raises(ValueError, match=rf"{cls.__name__}\({option}=.* cannot be boosted: it is not known to treat"):
        booster.boost(model, cls(model.parameters(), **options))
    with pytest.raises(ValueError, match="cannot be boosted"):
        booster.boost(model, cls([{"params": model.parameters(), "use_gc": True}]))  # an option of its group alone
    booster.boost(model, cls([{"params": model.parameters(), "note": "of the user's own"}]))


def test_a_class_of_another_module_is_not_taken_for_it() -> None:
    class Lion(MayClip):
        pass

    model = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="Lion, a subclass, which may compute something else"):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, Lion(model.parameters()))
