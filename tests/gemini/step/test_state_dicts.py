"""State dicts of a boosted optimizer as libraries make, change and load them: hooks, names, torch's DCP, wrappers."""

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Trained, check_same
from state_uses import same
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from gemini.checkpoint import load_optimizer, save_optimizer
from gemini.errors import CheckpointError
from gemini.nn.optimizer import HybridAdam

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]


def steps(run: Trained, first: int, count: int) -> list[float]:
    torch.manual_seed(7)  # runs take turns
    return [run.step(number) for number in range(first, first + count)]


# -- torch.distributed.checkpoint.state_dict

FLAT = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def get_and_forget(run: Trained) -> Any:
    return dcp.get_optimizer_state_dict(run.model, run.optimizer)


def get_and_set(run: Trained) -> Any:
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(run.model, run.optimizer))
    steps(run, 5, 1)
    dcp.set_optimizer_state_dict(run.model, run.optimizer, saved)
    return dcp.get_optimizer_state_dict(run.model, run.optimizer)


def get_and_set_flat(run: Trained) -> Any:
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(run.model, run.optimizer, options=FLAT))
    steps(run, 5, 1)
    dcp.set_optimizer_state_dict(run.model, run.optimizer, saved, options=FLAT)
    return dcp.get_optimizer_state_dict(run.model, run.optimizer, options=FLAT)


def model_and_optimizer(run: Trained) -> Any:
    saved = copy.deepcopy(dcp.get_state_dict(run.model, run.optimizer, options=FULL))
    steps(run, 5, 1)
    model, optimizer = saved
    dcp.set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    return dcp.get_state_dict(run.model, run.optimizer)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("use", [get_and_forget, get_and_set, get_and_set_flat, model_and_optimizer])
def test_torchs_distributed_state_dicts_do_to_training_what_they_do_to_plain_pytorch(
    use: Callable[[Trained], Any], before: int, placement: dict[str, Any]
) -> None:
    # torch reaches for every parameter by name, and holds what it reaches for.
    room = {name: "480KiB" for name in ("device_memory", "host_memory") if name in placement}
    found = []
    for run in (Trained({**placement, **room}), Trained(None)):
        losses = steps(run, 0, before)
        result = copy.deepcopy(use(run))
        found.append((run, losses, result, steps(run, before, 2), run.optimizer.state_dict()))
    (ours, *mine), (plain, *theirs) = found
    assert same(mine, theirs)
    check_same(ours, plain)


# -- hooks


def hooked(optimizer: Any) -> list[str]:
    """Registers one of each kind; each writes down that it was called, and on what."""
    called: list[str] = []

    def state(o: Any) -> str:
        return f"{len(o.state)} states, lr {o.param_groups[0]['lr']:g}"

    def after(o: Any, saved: dict[str, Any]) -> dict[str, Any]:
        called.append(f"post with {sorted(saved)}")
        for value in saved["state"].values():
            value["exp_avg"] = value["exp_avg"] * 0.5
        return {**saved, "param_groups": [{**group, "lr": 0.25} for group in saved["param_groups"]]}

    def before_load(o: Any, saved: dict[str, Any]) -> dict[str, Any]:
        called.append(f"load pre with lr {saved['param_groups'][0]['lr']:g}")
        return {**saved, "param_groups": [{**group, "lr": group["lr"] * 2} for group in saved["param_groups"]]}

    optimizer.register_state_dict_pre_hook(lambda o: called.append(f"pre of {state(o)}"))
    optimizer.register_state_dict_pre_hook(lambda o: called.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(after)
    optimizer.register_load_state_dict_pre_hook(before_load)
    optimizer.register_load_state_dict_post_hook(lambda o: called.append(f"load post of {state(o)}"))
    removed = optimizer.register_state_dict_post_hook(lambda *_: called.append("never"))
    removed.remove()
    return called


def through_a_dict(run: Trained, path: Path) -> Any:
    saved = run.optimizer.state_dict()
    given = copy.deepcopy(saved)
    run.optimizer.load_state_dict(saved)
    assert same(saved, given)


def through(name: str) -> Callable[[Trained, Path], None]:
    def save_and_load(run: Trained, path: Path) -> None:
        save_optimizer(run.optimizer, path / name)
        load_optimizer(run.optimizer, path / name)

    return save_and_load


@pytest.mark.one_in(2)
@pytest.mark.parametrize("way", [through_a_dict, through("folder"), through("file.pt")], ids=["dict", "folder", "file"])
def test_hooks_of_all_kinds_are_called_and_what_they_return_counts(
    way: Callable[[Trained, Path], None], placement: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for run in (Trained(placement), Trained(None)):
        called = hooked(run.optimizer)
        losses = steps(run, 0, 2)
        (way if run.is_managed else through_a_dict)(run, tmp_path)
        found.append((run, called, losses, steps(run, 2, 2), run.optimizer.param_groups[0]["lr"]))
    (ours, called, *mine), (plain, expected, *theirs) = found
    assert called == expected
    assert same(mine, theirs)
    check_same(ours, plain)


@pytest.mark.parametrize("is_boosted", [True, False])
def test_a_folder_says_what_it_has_no_place_for(is_boosted: bool, tmp_path: Path) -> None:
    run = Trained({} if is_boosted else None)
    steps(run, 0, 1)
    p = next(iter(run.model.parameters()))
    run.optimizer.state[p]["norms"] = torch.ones(3)
    save_optimizer(run.optimizer, tmp_path / "notes")
    run.optimizer.state[p]["norms"].zero_()
    load_optimizer(run.optimizer, tmp_path / "notes")
    assert same(run.optimizer.state[p]["norms"], torch.ones(3))
    run.optimizer.state[p]["note"] = {"a": 1}
    with pytest.raises(CheckpointError, match=r"'note' in the state of parameter 0 is a dict.*\.pt file"):
        save_optimizer(run.optimizer, tmp_path / "more")
    del run.optimizer.state[p]["note"]
    run.optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "run": 3})
    with pytest.raises(CheckpointError, match=r"no place for 'run'.*\.pt file"):
        save_optimizer(run.optimizer, tmp_path / "more")
    assert not (tmp_path / "more").exists() or not list((tmp_path / "more").iterdir())
    run.optimizer.state[p]["note"] = {"a": 1}
    save_optimizer(run.optimizer, tmp_path / "all.pt")
    assert torch.load(tmp_path / "all.pt")["run"] == 3
    run.optimizer.state[p].pop("note")
    load_optimizer(run.optimizer, tmp_path / "all.pt")
    assert run.optimizer.state[p]["note"] == {"a": 1}


# -- names


class Named(Trained):
    prefix = ""

    def make_optimizer(self, model: nn.Module) -> Any:
        named = [(self.prefix + name, p) for name, p in model.named_parameters()]
        return self.kind([{"params": named[::2]}, {"params": named[1::2], "weight_decay": 0.1}])

    def kind(self, groups: Any) -> Any:
        return HybridAdam(groups, lr=1e-2)


class NamedOtherwise(Named):
    prefix = "module."

    def kind(self, groups: Any) -> Any:
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("cls", [Named, NamedOtherwise])
def test_names_of_parameters_are_kept(cls: type[Named], placement: dict[str, Any], tmp_path: Path) -> None:
    ours, plain = cls(placement), cls(None)
    for run in (ours, plain):
        steps(run, 0, 1)
    names = [group["param_names"] for group in plain.optimizer.param_groups]
    assert [group["param_names"] for group in ours.optimizer.param_groups] == names
    assert same(ours.optimizer.state_dict(), plain.optimizer.state_dict())
    for path in (tmp_path / "folder", tmp_path / "file.pt"):
        save_optimizer(ours.optimizer, path)
        ours.optimizer.state.clear()
        load_optimizer(ours.optimizer, path)
        assert same(ours.optimizer.state_dict(), plain.optimizer.state_dict())
    assert json.loads((tmp_path / "folder" / "optimizer.json").read_text())["param_groups"][0]["param_names"]
    # As in torch, names in a loaded state dict count, and others stay where there are none.
    for run in (ours, plain):
        saved = copy.deepcopy(run.optimizer.state_dict())
        saved["param_groups"][0]["param_names"] = [name + "!" for name in names[0]]
        del saved["param_groups"][1]["param_names"]
        run.optimizer.load_state_dict(saved)
        steps(run, 1, 1)
    assert same(ours.optimizer.state_dict(), plain.optimizer.state_dict())
    assert ours.optimizer.param_groups[1]["param_names"] == names[1]
    check_same(ours, plain)


def test_named_groups_are_added_as_in_torch() -> None:
    for boosted in (True, False):
        run = Named({} if boosted else None)
        added, unnamed = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        run.optimizer.add_param_group({"params": [("added", added)], "lr": 0.5})
        assert run.optimizer.param_groups[2]["param_names"] == ["added"]
        with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
            run.optimizer.add_param_group({"params": [unnamed]})
        assert len(run.optimizer.param_groups) == 3


def test_what_a_loaded_group_says_is_copied() -> None:
    run = Trained({})
    steps(run, 0, 1)
    saved = run.optimizer.state_dict()
    saved["param_groups"][0]["schedule"] = {"warm": 3}
    run.optimizer.load_state_dict(saved)
    saved["param_groups"][0]["schedule"]["warm"] = 4
    assert run.optimizer.param_groups[0]["schedule"] == {"warm": 3}


# -- wrappers


class Wrapper:
    """As Lightning's: of the optimizer's class without its attributes, for which it asks the optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Copied:
    """As Lightning's once was: with the attributes that the optimizer had when it was wrapped."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}
        self.__class__ = type("Copied" + type(optimizer).__name__, (Copied, type(optimizer)), {})
        self._optimizer = optimizer


@pytest.mark.one_in(3)
@pytest.mark.parametrize("wrap", [Wrapper, Copied])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_wrappers_of_the_optimizers_class_do_what_it_does(wrap: Any, states: str, placement: dict[str, Any]) -> None:
    class Wrapped(Trained):
        def make_optimizer(self, model: nn.Module) -> Any:
            return HybridAdam(model.parameters(), lr=1e-2, states=states)

    found = []
    for run in (Wrapped(placement), Wrapped(None)):
        steps(run, 0, 1)
        wrapped = wrap(run.optimizer)
        parameters = [p for group in wrapped.param_groups for p in group["params"]]
        run.backward(run.loss(1))
        wrapped.zero_grad()  # else the next backward adds to it
        called = hooked(wrapped)
        assert set(wrapped.state) == set(parameters)
        saved = copy.deepcopy(wrapped.state_dict())
        wrapped.state.pop(parameters[0])
        torch.manual_seed(7)
        run.backward(run.loss(2))
        wrapped.step()
        wrapped.zero_grad()
        found.append((run, called, saved, steps(run, 3, 1), run.optimizer.state_dict()))
    (ours, *mine), (plain, *theirs) = found
    assert same(mine, theirs)
    check_same(ours, plain)


def test_the_mapping_keeps_no_optimizer_alive() -> None:
    run = Trained({})
    steps(run, 0, 1)
    held = run.optimizer.state, next(iter(run.optimizer.state.values()))["exp_avg"]
    gone = weakref.ref(run.optimizer)
    del run
    gc.collect()
    assert gone() is None
    del held


def test_the_optimizer_that_was_given_to_boost_shows_and_takes_states() -> None:
    class Given(Trained):
        def make_optimizer(self, model: nn.Module) -> Any:
            self.given = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
            return self.given

    ours, plain = Given({}), Given(None)
    for run in (ours, plain):
        steps(run, 0, 1)
        assert len(run.given.state) == 14
        for state in run.given.state.values():
            state["exp_avg"].mul_(0.5)
        run.given.state.pop(next(iter(run.model.parameters())))
        steps(run, 1, 2)
    check_same(ours, plain)
    gone = weakref.ref(ours.optimizer)
    given = ours.given
    del ours, run
    gc.collect()
    assert gone() is None
    assert len(given.state) == 0
