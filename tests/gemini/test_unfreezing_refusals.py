"""Layers that cannot be unfrozen: clear errors, and nothing has changed."""

from typing import Any

import pytest
from gradual import PLUGINS, Gradual, check_same, parts
from loop import SMALL, batch, build
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MASTER, Tier
from gemini.errors import OffloadError, OutOfMemory
from gemini.nn.optimizer import HybridAdam

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("in_group", [False, True])
def test_without_room_it_is_an_error_and_training_goes_on_without_them(in_group: bool) -> None:
    free = Gradual("adam", "fp32", {"host_memory": "150KiB", **SMALL}, in_group)
    losses = [free.step(step) for step in range(2)]
    groups = len(free.optimizer.param_groups)
    text = r"To unfreeze chunks with .*, .* are missing for their masters, gradients and states; nothing has been chang"
    used = boosted(free.model).manager.ledger.used(Tier.HOST)
    if in_group:
        free.unfreeze(1)
        free.backward(2)
        with pytest.raises(OutOfMemory, match=text):
            free.optimizer.step()
        for parameter in free.stages[1]:
            parameter.requires_grad_(False)
        free.optimizer.zero_grad()
    else:
        with pytest.raises(OutOfMemory, match=text):
            free.unfreeze(1)
        for parameter in free.stages[1]:
            parameter.requires_grad_(False)
    assert len(free.optimizer.param_groups) == groups
    assert boosted(free.model).manager.ledger.used(Tier.HOST) <= used
    assert not any(chunk.is_trainable for p in free.stages[1] if (chunk := boosted(free.model).manager.find(p)[0]))
    plain = Gradual("adam", "fp32", None, in_group)
    assert [plain.step(step) for step in range(2)] == losses
    assert [free.step(step) for step in range(2, 4)] == [plain.step(step) for step in range(2, 4)]
    check_same(free, plain)


def test_what_the_system_refuses_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = Gradual("adam", "fp32", None), Gradual("adam", "fp32", SMALL)
    assert ours.step(0) == plain.step(0)
    manager = boosted(ours.model).manager
    used = manager.ledger.used(Tier.HOST)
    home, calls = manager.device.home, iter(range(100))

    def refusing(*args: Any) -> Any:
        if next(calls) == 5:
            raise MemoryError("no more")
        return home(*args)

    monkeypatch.setattr(manager.device, "home", refusing)
    with pytest.raises(MemoryError):
        ours.unfreeze(1)
    monkeypatch.undo()
    assert manager.ledger.used(Tier.HOST) == used and len(ours.optimizer.param_groups) == 1
    for run in (plain, ours):
        run.unfreeze(1)
    assert ours.step(1) == plain.step(1)
    check_same(ours, plain)


def test_states_that_cannot_be_filled_leave_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = Gradual("adagrad", "fp32", None), Gradual("adagrad", "fp32", SMALL)
    assert ours.step(0) == plain.step(0)

    def refusing(name: str) -> float:
        raise OffloadError(5, "the disk is away")

    monkeypatch.setattr(ours.optimizer.rule, "initial", refusing)
    with pytest.raises(OffloadError):
        ours.unfreeze(1)
    monkeypatch.undo()
    assert len(ours.optimizer.param_groups) == 1
    for run in (plain, ours):
        run.unfreeze(1)
    assert ours.step(1) == plain.step(1)
    check_same(ours, plain)


def test_states_in_blocks_that_do_not_begin_with_the_parameters_are_refused() -> None:
    model: Any = build()
    head, rest = parts(model)
    for parameter in rest:
        parameter.requires_grad_(False)
    optimizer = HybridAdam(head, states="8bit")
    model, optimizer, *_ = Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, optimizer)
    with pytest.raises(ValueError, match=r"was packed without room for blocks of 256 elements.*freeze them after it"):
        optimizer.add_param_group({"params": rest})
    assert len(optimizer.param_groups) == 1


def test_options_that_keep_other_states_in_the_same_chunk_are_refused() -> None:
    ours = Gradual("sgd", "fp32", PLUGINS["one chunk"])
    ours.step(0)
    ours.unfreeze(1)
    with pytest.raises(
        ValueError, match=r"shares a chunk with .* keeps momentum_buffer in torch.float32, and with the"
    ):
        ours.optimizer.add_param_group({"params": ours.stages[2], "momentum": 0.0})
    assert len(ours.optimizer.param_groups) == 2


def test_room_for_full_copies_is_not_taken_for_homes() -> None:
    def trained(**plugin: Any) -> Gradual:
        run = Gradual("adam", "bf16", {**SMALL, **plugin})
        run.step(0)
        run.step(1)
        return run

    roomy = trained()
    manager, engine = boosted(roomy.model).manager, boosted(roomy.model).engine
    old = sum(chunk.homes[MASTER].nbytes for chunk in {manager.find(p)[0] for p in roomy.stages[1]})  # type: ignore[index]
    roomy.unfreeze(1)
    resident = sum(chunk.full_nbytes for chunk in manager.chunks if chunk.is_resident)
    enough = (
        manager.ledger.used(Tier.HOST) - resident + engine.pacing.least_bytes({}) + old
    )  # these go when the new ones are there
    tight, short = trained(host_memory=enough), trained(host_memory=enough - 1)
    with pytest.raises(OutOfMemory, match="To unfreeze chunks with"):
        short.unfreeze(1)
    tight.unfreeze(1)
    assert [tight.step(step) for step in range(2, 5)] == [roomy.step(step) for step in range(2, 5)]
    check_same(tight, roomy)


def test_what_is_in_use_is_not_unfrozen() -> None:
    ours = Gradual("adam", "fp32", SMALL)
    ours.step(0)
    layer = next(module for module in ours.model if next(iter(module.parameters()), None) is ours.stages[1][0])

    def add(module: nn.Module, inputs: Any) -> None:
        with pytest.raises(ValueError, match=r"\.weight is in use: unfreeze it between steps"):
            ours.unfreeze(1)

    handle = layer.register_forward_pre_hook(add)
    ours.model(batch(1))
    handle.remove()
    assert len(ours.optimizer.param_groups) == 1
    ours.unfreeze(1)
    ours.step(1)


def test_within_a_step_that_backward_has_begun_nothing_is_added() -> None:
    ours = Gradual("adam", "fp32", {**SMALL, "update_in_backward": True})
    ours.backward(0)
    with pytest.raises(ValueError, match="cannot add parameters now"):
        ours.unfreeze(1)
    ours.optimizer.step()
    assert len(ours.optimizer.param_groups) == 1


def test_adding_what_another_group_has_is_refused_as_torch_does() -> None:
    model: Any = build()
    model, optimizer, *_ = Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, HybridAdam(model.parameters()))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[0].weight]})
    assert len(optimizer.param_groups) == 1
