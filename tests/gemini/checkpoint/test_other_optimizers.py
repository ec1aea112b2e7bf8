"""Checkpoints of element-wise torch optimizers: to and from torch, and never into another optimizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import boost, gpt2, train
from loop import check_same
from other_optimizers import OPTIMIZERS, Other
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.checkpoint import load_optimizer
from gemini.errors import CheckpointError

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


FORMS = ["folder", "optimizer.pt"]
SMALL_DISK = {"host_memory": "640KiB", "chunk_config_dict": {1: {"chunk_size": 1024}}}


def moved_weights(source: Other, target: Other) -> None:
    """The weights of one run into the other."""
    target.model.load_state_dict({name: value.clone() for name, value in source.weights().items()})


@pytest.mark.one_in(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_boosted_to_torch_and_back_with_the_same_bits(
    name: str, form: str, tmp_path: Path
) -> None:
    straight = Other(name, None)
    losses = [straight.step(step) for step in range(6)]

    ours = Other(name, {**SMALL_DISK, "offload_dir": tmp_path} if form == "folder" else {})
    assert [ours.step(step) for step in range(2)] == losses[:2]
    ours.booster.save_optimizer(ours.optimizer, tmp_path / "first" / form)

    theirs = Other(name, None)
    moved_weights(ours, theirs)
    if form == "folder":
        load_optimizer(theirs.optimizer, tmp_path / "first" / form)
    else:
        theirs.optimizer.load_state_dict(torch.load(tmp_path / "first" / form, weights_only=True))
    assert [theirs.step(step) for step in range(2, 4)] == losses[2:4]
    torch.save(theirs.optimizer.state_dict(), tmp_path / "second.pt")

    again = Other(name, {})
    moved_weights(theirs, again)
    again.booster.load_optimizer(again.optimizer, tmp_path / "second.pt")
    assert [again.step(4)] == losses[4:5]
    state = again.optimizer.state_dict()

    last = Other(name, {})
    moved_weights(again, last)
    last.optimizer.load_state_dict(state)
    assert [last.step(5)] == losses[5:]
    check_same(last, straight)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["SGD", "SGD with momentum", "Adagrad", "Rprop"])
def test_parameters_that_had_not_stepped_begin_again(name: str, form: str, tmp_path: Path) -> None:
    run = Other(name, {})
    run.booster.save_optimizer(run.optimizer, tmp_path / form)
    weights, fresh = run.weights(), run.optimizer.state_dict()["state"]
    numbers = set(range(len(weights)))
    losses = [run.step(step) for step in range(2)]
    for load in (
        lambda: run.booster.load_optimizer(run.optimizer, tmp_path / form),
        lambda: run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": fresh}),
    ):
        load()
        found = run.optimizer.state_dict()["state"]
        assert found.keys() == fresh.keys() == (numbers if name == "Adagrad" else set())
        assert all(torch.equal(found[i][key], value) for i in fresh for key, value in fresh[i].items())
        run.model.load_state_dict(weights)
        assert [run.step(step) for step in range(2)] == losses


def linear(cls: Any, **options: Any) -> tuple[Booster, nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, *_ = booster.boost(model, cls(model.parameters(), lr=0.1, **options))
    booster.backward(model(torch.ones(1, 8)).sum(), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return booster, model, optimizer


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.optim.AdamW, torch.optim.SGD),
        (torch.optim.SGD, torch.optim.AdamW),
        (torch.optim.RMSprop, torch.optim.Adagrad),
        (torch.optim.RAdam, torch.optim.AdamW),
    ],
)
def test_the_state_of_another_optimizer_is_refused(source: Any, target: Any, form: str, tmp_path: Path) -> None:
    booster, _, optimizer = linear(source)
    booster.save_optimizer(optimizer, tmp_path / form)
    _, _, other = linear(target)
    before = other.state_dict()
    names = [cls.__name__.replace("AdamW", "Adam") for cls in (source, target)]
    with pytest.raises(CheckpointError, match=f"has the state of {names[0]}, which {names[1]} cannot go on with"):
        booster.load_optimizer(other, tmp_path / form)
    with pytest.raises(CheckpointError, match="cannot go on with"):
        load_optimizer(target(nn.Linear(8, 4).parameters(), lr=0.1), tmp_path / form)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert repr(after["state"]) == repr(before["state"])


def test_a_state_dict_of_torch_that_does_not_say_whose_it_is_is_known_by_its_keys() -> None:
    _, _, adam = linear(torch.optim.AdamW)
    _, _, sgd = linear(torch.optim.SGD, momentum=0.9)
    _, _, rmsprop = linear(torch.optim.RMSprop)
    with pytest.raises(ValueError, match=r"parameter 0 has exp_avg, exp_avg_sq, which SGD does not keep"):
        sgd.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 has square_avg, which Adam does not keep"):
        adam.load_state_dict(rmsprop.state_dict())


def test_a_state_that_needs_room_which_is_not_there_is_refused(tmp_path: Path) -> None:
    booster, _, with_momentum = linear(torch.optim.SGD, momentum=0.9)
    booster.save_optimizer(with_momentum, tmp_path / "with")
    _, _, without = linear(torch.optim.SGD)
    with pytest.raises(CheckpointError, match=r"SGD keeps momentum_buffer, for which group 0 has no room; give the"):
        booster.load_optimizer(without, tmp_path / "with")
    assert without.param_groups[0]["momentum"] == 0
    booster.save_optimizer(without, tmp_path / "without")
    booster.load_optimizer(with_momentum, tmp_path / "without")
    assert with_momentum.param_groups[0]["momentum"] == 0
    assert with_momentum.state_dict()["state"] == {}


def test_the_first_version_of_the_files_is_adams(tmp_path: Path) -> None:
    booster, model, optimizer = boost(gpt2())
    train(booster, model, optimizer, range(2))
    booster.save_optimizer(optimizer, tmp_path)
    path = tmp_path / "optimizer.json"
    content = json.loads(path.read_text())
    assert (content["version"], content.pop("optimizer")) == (2, "Adam")
    del content["crc32"]
    path.write_text(json.dumps({**content, "version": 1}))
    other_booster, _, other = boost(gpt2())
    other_booster.load_optimizer(other, tmp_path)
    found, expected = other.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(found[i][key], value) for i, state in expected.items() for key, value in state.items())
    with pytest.raises(CheckpointError, match="has the state of Adam, which SGD cannot go on with"):
        booster.load_optimizer(linear(torch.optim.SGD)[2], tmp_path)
