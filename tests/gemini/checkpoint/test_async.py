"""Saved in the background is what was there at the call, whatever happens while it is written."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import Mixed, assert_same, gpt2, mixed, train
from safetensors.torch import load_file
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk.snapshot import Snapshot
from gemini.nn.optimizer import HybridAdam

SECONDS = 20.0
PLACEMENTS = ["home", "copied", "disk"]


class Writer:
    """Holds the thread that writes at its next value until it is let go."""

    def __init__(self) -> None:
        self.may_read = threading.Event()
        self.may_read.set()

    def hold(self) -> None:
        self.may_read.clear()

    def let_go(self) -> None:
        self.may_read.set()


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    held, read = Writer(), Snapshot.read

    def waiting(snapshot: Snapshot, *which: Any) -> Tensor:
        assert held.may_read.wait(SECONDS)
        return read(snapshot, *which)

    monkeypatch.setattr(Snapshot, "read", waiting)
    yield held
    held.let_go()


def boosted(model: nn.Module, placement: str, folder: Path, precision: str = "", **options: Any) -> tuple[Any, ...]:
    """Parameters that are their own homes, copies of homes in RAM, and of homes on disk."""
    if placement != "home":
        options |= {"device_memory": "128KiB", "chunk_config_dict": {1: {"chunk_size": 4096}}}
    if placement == "disk":
        options |= {"host_memory": "300KiB", "offload_dir": folder}
    precision = precision or ("fp32" if placement == "home" else "bf16")
    booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, snapshot_memory="1MiB", **options))
    trainable = [p for p in model.parameters() if p.requires_grad]
    model, optimizer, *_ = booster.boost(model, HybridAdam(trainable, lr=1e-2, weight_decay=0.1))
    return booster, model, optimizer


def files(folder: Path) -> dict[str, Any]:
    """All that the newest checkpoint in a folder holds, but for what no two have in common."""
    newest = max(folder.glob("checkpoint-*"))
    found: dict[str, Any] = {path.name: load_file(path) for path in newest.glob("*.safetensors")}
    for path in newest.iterdir():
        if path.suffix != ".safetensors" and path.name != "manifest.json":
            found[path.name] = path.read_bytes()
    return found


def assert_same_files(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        if isinstance(content, dict):
            assert_same(found[name], content)
        else:
            assert found[name] == content, name


def step(booster: Booster, model: nn.Module, optimizer: Any) -> None:
    model.train()
    loss = model(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)))
    booster.backward(loss.float(), optimizer)
    optimizer.step()
    optimizer.zero_grad()


def each(change: Callable[[Tensor], object]) -> Callable[..., None]:
    def change_all(booster: Booster, model: nn.Module, optimizer: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                change(parameter)

    return change_all


def each_state(change: Callable[[dict[str, Tensor]], object]) -> Callable[..., None]:
    def change_all(booster: Booster, model: nn.Module, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                change(optimizer.state[parameter])

    return change_all


def assign(parameter: Tensor) -> None:
    parameter.data = torch.full_like(parameter, 0.25)


def foreach(booster: Booster, model: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        torch._foreach_mul_([p for p in model.parameters() if p.dtype is not torch.float64], 0.5)


def load(booster: Booster, model: nn.Module, optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {}})


def hyperparameters(booster: Booster, model: nn.Module, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group.update(lr=0.5, betas=(0.1, 0.2), mine=[1])
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter]["note"] = torch.ones(2)


def buffers(booster: Booster, model: nn.Module, optimizer: Any) -> None:
    for buffer in model.buffers():
        buffer.fill_(1)


def new_group(booster: Booster, model: Mixed, optimizer: Any) -> None:
    optimizer.state.clear()
    optimizer.state[model.scale] = {}


CHANGES: dict[str, Callable[..., None]] = {
    "step": step,
    "mul_": each(lambda p: p.mul_(2)),
    "data.add_": each(lambda p: p.data.add_(1)),
    "data = ": each(assign),
    "detach().numpy()": each(lambda p: p.detach().numpy().fill(3) if p.dtype is torch.float32 else p.fill_(3)),
    "init": each(lambda p: nn.init.constant_(p, 5.0)),
    "foreach": foreach,
    "state in place": each_state(lambda state: state["exp_avg"].zero_()),
    "state assigned": each_state(lambda state: state.update(exp_avg_sq=torch.ones_like(state["exp_avg_sq"]))),
    "load": load,
    "hyperparameters": hyperparameters,
    "buffers": buffers,
    "clear": new_group,
}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_what_changes_while_it_is_written_is_saved_as_it_was(placement: str, tmp_path: Path, writer: Writer) -> None:
    booster, model, optimizer = boosted(mixed(), placement, tmp_path / "disk")
    step(booster, model, optimizer)
    held = [parameter.data for parameter in model.parameters()]  # written to below, past everybody
    for change in CHANGES.values():
        booster.save(tmp_path / "now", model=model, optimizer=optimizer, keep=1)
        writer.hold()
        booster.save(tmp_path / "later", model=model, optimizer=optimizer, keep=1, use_async=True)
        change(booster, model, optimizer)
        with torch.no_grad():
            for memory in held:
                memory.add_(1)
        step(booster, model, optimizer)
        model.state_dict(), optimizer.state_dict()
        writer.let_go()
        booster.wait_until_finished()
        assert_same_files(files(tmp_path / "later"), files(tmp_path / "now"))


@pytest.mark.parametrize(("placement", "precision"), [("home", "fp32"), ("copied", "bf16"), ("disk", "fp16")])
def test_training_is_what_it_is_without_a_save(placement: str, precision: str, tmp_path: Path, writer: Writer) -> None:
    booster, model, optimizer = boosted(gpt2(), placement, tmp_path / "disk", precision)
    plain_booster, plain, plain_optimizer = boosted(gpt2(), placement, tmp_path / "plain", precision)
    losses = train(booster, model, optimizer, range(2))
    booster.save(tmp_path / "now", model=model, optimizer=optimizer)
    writer.hold()
    booster.save(tmp_path / "later", model=model, optimizer=optimizer, use_async=True)
    losses += train(booster, model, optimizer, range(2, 3 if placement == "disk" else 5))  # there copies find no room
    writer.let_go()
    losses += train(booster, model, optimizer, range(len(losses), 6))
    booster.wait_until_finished()
    assert losses == train(plain_booster, plain, plain_optimizer, range(6))
    assert_same(model.state_dict(), plain.state_dict())
    assert_same_files(files(tmp_path / "later"), files(tmp_path / "now"))


@pytest.mark.parametrize("options", [{"update_in_backward": True}, {"split_master": True}, {"snapshot_memory": 0}])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_file_is_the_same_however_updates_come(
    options: dict[str, Any], placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if placement != "home":
        options = options | {"device_memory": "128KiB", "chunk_config_dict": {1: {"chunk_size": 4096}}}
    if placement == "disk":
        options = options | {"host_memory": "300KiB", "offload_dir": tmp_path / "disk"}
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **options))
    model, optimizer = _boost(booster)
    train(booster, model, optimizer, range(2))
    for at in range(2, 6, 2):
        booster.save(tmp_path / "now", model=model, optimizer=optimizer, keep=1)
        booster.save(tmp_path / "later", model=model, optimizer=optimizer, keep=1, use_async=True)
        train(booster, model, optimizer, range(at, at + 2))
        booster.wait_until_finished()
        assert_same_files(files(tmp_path / "later"), files(tmp_path / "now"))


def _boost(booster: Booster) -> tuple[Any, Any]:
    model = gpt2()
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
    return model, optimizer
