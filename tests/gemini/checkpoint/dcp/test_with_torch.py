"""What torch saves we load, and what we save torch loads: `torch.distributed.checkpoint` with one process."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.checkpoint import dcp
from gemini.errors import CheckpointError
from gemini.nn.optimizer import HybridAdam


class Tied(nn.Module):
    """Tied, frozen and buffered, with a module that has a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.last = nn.Linear(16, 16, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.notes = ["a", 1]

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.last(self.frozen(self.second(self.first(x))))

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


class Training:
    def __init__(self, seed: int = 0, lr: float = 1e-2, *, is_managed: bool = True, **plugin: Any) -> None:
        torch.manual_seed(seed)
        self.model: Any = Tied()
        if is_managed:
            self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **plugin))
            optimizer = HybridAdam(self.groups(), lr=lr)
            self.model, self.optimizer, *_ = self.booster.boost(self.model, optimizer)
        else:
            # What HybridAdam is bit-equal to: lengths are multiples of 16.
            self.optimizer = torch.optim.AdamW(self.groups(), lr=lr, weight_decay=0.0, fused=True)
        self.is_managed = is_managed

    def groups(self) -> list[dict[str, Any]]:
        named = dict(self.model.named_parameters())
        one = [p for name, p in named.items() if "second" not in name]
        return [{"params": one}, {"params": [p for name, p in named.items() if "second" in name], "betas": (0.8, 0.9)}]

    def train(self, steps: range) -> None:
        for step in steps:
            loss = self.model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().mean()
            if self.is_managed:
                self.booster.backward(loss, self.optimizer)
            else:
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a load without ranks, and of typed storages
        yield


def state_of(training: Training) -> dict[str, Any]:
    with quiet():
        model, optimizer = get_state_dict(training.model, training.optimizer)
    return {"model": model, "optim": optimizer}


def load_by_torch(folder: str, training: Training) -> None:
    state = state_of(training)
    with quiet():
        torch_dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            training.model, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )


def same(ours: Training, theirs: Training) -> None:
    expected = theirs.model.state_dict()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name], name
    groups, others = ours.optimizer.param_groups, theirs.optimizer.param_groups
    for group, other in zip(groups, others, strict=True):
        assert (group["lr"], tuple(group["betas"])) == (other["lr"], tuple(other["betas"]))
        for parameter, its in zip(group["params"], other["params"], strict=True):
            state, wanted = ours.optimizer.state[parameter], theirs.optimizer.state[its]
            assert state.keys() == wanted.keys()
            assert all(torch.equal(state[key], wanted[key]) for key in state)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, Training]:
    training = Training(chunk_config_dict={1: {"chunk_size": 64}})
    training.train(range(2))
    training.model.notes.append(2.5)
    dcp.save(tmp_path / "saved", training.model, training.optimizer)
    return str(tmp_path / "saved"), training


def test_a_plain_script_goes_on_from_what_we_saved(saved: tuple[str, Training]) -> None:
    folder, ours = saved
    plain = Training(seed=1, lr=5.0, is_managed=False)
    load_by_torch(folder, plain)
    same(ours, plain)
    for group in plain.optimizer.param_groups:
        group["fused"] = True  # it has the options of what was saved now
    ours.train(range(2, 4))
    plain.train(range(2, 4))
    same(ours, plain)


@pytest.mark.parametrize("flat", [False, True], ids=["by group", "by parameter"])
@pytest.mark.parametrize("first", [(), ("app",)], ids=["as get_state_dict", "deeper"])
def test_we_go_on_from_what_a_plain_script_saved(tmp_path: Path, flat: bool, first: tuple[str, ...]) -> None:
    plain = Training(is_managed=False)
    plain.train(range(2))
    options = torch_dcp.state_dict.StateDictOptions(flatten_optimizer_state_dict=flat)
    with quiet():
        model, optimizer = get_state_dict(plain.model, plain.optimizer, options=options)
        state: dict[str, Any] = {"model": model, "optim": optimizer}
        for name in first:
            state = {name: state}
        torch_dcp.save(state, checkpoint_id=tmp_path)
    ours = Training(seed=1, lr=5.0, chunk_config_dict={1: {"chunk_size": 64}})
    dcp.load(tmp_path, ours.model, ours.optimizer)
    same(ours, plain)
    plain.train(range(2, 4))
    ours.train(range(2, 4))
    same(ours, plain)


def test_the_model_alone_is_loaded_where_nothing_has_a_first_name(tmp_path: Path) -> None:
    plain = Training(is_managed=False)
    with quiet():
        torch_dcp.save(plain.model.state_dict(), checkpoint_id=tmp_path)
    ours = Training(seed=1)
    dcp.load(tmp_path, ours.model)
    assert torch.equal(ours.model.state_dict()["first.weight"], plain.model.first.weight)


def test_torchs_tool_makes_one_file_of_it(saved: tuple[str, Training], tmp_path: Path) -> None:
    folder, ours = saved
    with quiet():
        dcp_to_torch_save(folder, tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    expected = ours.model.state_dict()
    assert one["model"].keys() == expected.keys()
    assert torch.equal(one["model"]["last.weight"], expected["first.weight"])
    assert one["optim"]["param_groups"][1]["params"] == ["second.weight", "second.bias"]
    assert torch.equal(one["optim"]["state"]["second.bias"]["step"], torch.tensor(2.0))


def test_the_planners_serve_torchs_save_and_load(tmp_path: Path) -> None:
    ours, other = Training(), Training(seed=1)
    ours.train(range(2))
    with quiet():
        torch_dcp.save({"epoch": 3}, checkpoint_id=tmp_path, planner=dcp.SavePlanner(ours.model, ours.optimizer))
        state = {"epoch": 0}
        with dcp.LoadPlanner(other.model, other.optimizer) as planner:
            torch_dcp.load(state, checkpoint_id=tmp_path, planner=planner)
    assert state == {"epoch": 3}
    same(other, ours)
    with pytest.raises(BaseException, match="use it as a context manager"), quiet():
        torch_dcp.load({}, checkpoint_id=tmp_path, planner=dcp.LoadPlanner(other.model))


def test_tied_parameters_are_written_once(saved: tuple[str, Training], tmp_path: Path) -> None:
    folder, ours = saved
    size = os.path.getsize(f"{folder}/__0_0.distcp")
    twice = tmp_path / "twice"
    with quiet():
        torch_dcp.save({}, checkpoint_id=twice, planner=dcp.SavePlanner(ours.model, ours.optimizer))
    assert size < os.path.getsize(twice / "__0_0.distcp")


def test_another_checkpoint_is_not_written_over(saved: tuple[str, Training]) -> None:
    folder, ours = saved
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    with pytest.raises(CheckpointError, match="is there, and is not replaced"):
        dcp.save(folder, ours.model)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before
    assert [path.name for path in Path(folder).parent.iterdir()] == ["saved"]


def test_what_would_not_load_again_is_refused(tmp_path: Path) -> None:
    ours = Training()
    ours.model.notes = [object()]
    with pytest.raises(CheckpointError, match=r"model\._extra_state is a list that holds more than plain values"):
        dcp.save(tmp_path / "x", ours.model)
    assert not list(tmp_path.iterdir())


def test_optimizers_of_torch_have_to_be_boosted_first(tmp_path: Path) -> None:
    plain = Training(is_managed=False)
    with pytest.raises(TypeError, match=r"expected a HybridAdam, or what booster\.boost returned, got AdamW"):
        dcp.save(tmp_path / "x", plain.model, plain.optimizer)
