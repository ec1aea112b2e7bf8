"""What ColossalAI's wrappers have, on a boosted model and its optimizer."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import CPUAdam, FusedAdam, HybridAdam


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


def boosted(model: nn.Module | None = None, adam: Any = HybridAdam, **options: Any) -> tuple[Any, Any, Booster]:
    torch.manual_seed(0)
    model = Net() if model is None else model
    booster = Booster(plugin=GeminiPlugin(**{"precision": "fp32", "telemetry": False, **options}))
    model, optimizer, *_ = booster.boost(model, adam(model.parameters(), lr=0.01))
    return model, optimizer, booster


def inputs(steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(3, 4, generator=generator) for _ in range(steps))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_backward_of_the_optimizer_is_that_of_the_booster(precision: str) -> None:
    """With fp16 it scales the loss."""
    weights = []
    for of_optimizer in (False, True):
        model, optimizer, booster = boosted(precision=precision)
        for batch in inputs(3):
            loss = model(batch.to(model.first.weight.dtype)).square().mean()
            optimizer.backward(loss) if of_optimizer else booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_optimizer_that_is_not_boosted_runs_plain_backward() -> None:
    model = Net()
    optimizer = HybridAdam(model.parameters())
    optimizer.backward(model(torch.ones(1, 4)).sum())
    assert model.first.weight.grad is not None
    assert optimizer.get_grad_norm() is None


def test_backward_refuses_what_it_would_not_scale() -> None:
    model, optimizer, _ = boosted()
    loss = model(torch.ones(1, 4)).sum()
    for arguments in ({"retain_graph": True}, {"inputs": [model.first.weight]}):
        with pytest.raises(NotImplementedError, match=r"call loss\.backward"):
            optimizer.backward(loss, **arguments)
    loss.backward(retain_graph=True)  # the way out
    optimizer.backward(loss)


def test_nothing_is_wrapped() -> None:
    model, optimizer, _ = boosted()
    assert model.unwrap() is model and model.unwrap(unwrap_peft=False) is model
    assert optimizer.unwrap() is optimizer and optimizer.optim is optimizer
    assert isinstance(model.unwrap(), Net) and isinstance(optimizer.unwrap(), HybridAdam)


def test_an_optimizer_of_torchs_has_the_names_as_what_it_has_become() -> None:
    torch.manual_seed(0)
    model, given = Net(), None
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, given)
    before = model.state_dict()["first.weight"]
    optimizer.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    assert not torch.equal(model.state_dict()["first.weight"], before)
    assert given.unwrap() is optimizer.unwrap()  # type: ignore[attr-defined]


def test_an_optimizer_whose_model_has_another_one_now_refuses() -> None:
    from gemini.boosting.succession import give_optimizer

    model, first, _ = boosted()
    give_optimizer(model, HybridAdam(model.parameters()))
    for call in (lambda: first.backward(torch.ones(1)), first.get_grad_norm):
        with pytest.raises(ValueError, match="has been given another one"):
            call()


def test_the_norm_is_the_last_one_that_was_computed_before_clipping() -> None:
    model, optimizer, _ = boosted(max_norm=0.1)
    assert optimizer.get_grad_norm() is None
    plain = Net()
    plain.load_state_dict(model.state_dict())
    for net in (model, plain):
        loss = net(torch.ones(2, 4)).sum()
        optimizer.backward(loss) if net is model else loss.backward()
    optimizer.step()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert expected > 0.1
    assert optimizer.get_grad_norm() == expected.item()


def test_module_is_the_model_without_a_module() -> None:
    model, _, _ = boosted()
    inner = model.module
    assert isinstance(inner, Net) and type(inner).__name__ == "Net"
    assert inner.first is model.first and list(inner.state_dict()) == list(model.state_dict())
    assert not hasattr(inner, "module")
    unwrapped = model
    for _ in range(5):  # what libraries do until there is no module
        unwrapped = getattr(unwrapped, "module", unwrapped)
    assert unwrapped.first is model.first
    inner.eval()
    assert not model.training
    model.added = 3
    assert inner.added == 3


def test_training_through_module_is_training_the_model() -> None:
    weights = []
    for through_module in (False, True):
        model, optimizer, booster = boosted(device_memory="64KiB", min_chunk_size_m=0.0001, search_range_m=0)
        called = model.module if through_module else model
        for batch in inputs(3):
            booster.backward(called(batch).square().mean(), optimizer)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(called.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_module_keeps_the_model_alive_and_not_the_other_way_round() -> None:
    model, _, _ = boosted()
    expected = model(torch.ones(1, 4))
    inner = model.module
    del model
    gc.collect()
    assert torch.equal(inner(torch.ones(1, 4)), expected)


def test_module_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model, _, booster = boosted()
    booster.save_model(model.module, str(tmp_path / "a.safetensors"))
    other, _, _ = boosted(Net())
    booster.load_model(other.module, str(tmp_path / "a.safetensors"), low_cpu_mem_mode=False, num_threads=4)
    assert torch.equal(other.state_dict()["first.weight"], model.state_dict()["first.weight"])


class Wrapper(nn.Module):
    """Has a module and an unwrap of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]

    def unwrap(self) -> str:
        return "the user's"


def test_what_the_user_has_by_these_names_stays() -> None:
    model, _, _ = boosted(Wrapper())
    assert type(model.module) is Net
    assert model.unwrap() == "the user's"
    assert not hasattr(Net(), "module")  # the classes of users are not touched


def test_what_the_user_puts_there_later_stays_too() -> None:
    model, _, _ = boosted()
    model.module = 3
    assert model.module == 3
    del model.module
    assert type(model.module).__name__ == "Net"
    model.module = nn.Identity()
    assert model.module is model.get_submodule("module")


@pytest.mark.parametrize("adam", [CPUAdam, FusedAdam])
def test_the_other_adams_are_hybrid_adam(adam: Any) -> None:
    assert adam is HybridAdam
    model, optimizer, booster = boosted(adam=adam)
    booster.backward(model(torch.ones(1, 4)).sum(), optimizer)
    optimizer.step()
    assert type(optimizer) is HybridAdam


def test_the_booster_takes_colossalais_further_arguments(tmp_path: Path) -> None:
    model, optimizer, booster = boosted()
    booster.save_model(model, str(tmp_path / "model"), shard=True, gather_dtensor=True, use_async=True)
    booster.backward(model(torch.ones(1, 4)).sum(), optimizer)
    optimizer.step()
    booster.save_optimizer(optimizer, str(tmp_path / "optimizer"), shard=True, gather_dtensor=True, use_async=True)
    saved = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    optimizer.step()
    booster.load_optimizer(optimizer, str(tmp_path / "optimizer"), low_cpu_mem_mode=False, num_threads=2)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], saved)
