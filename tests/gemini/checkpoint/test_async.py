"""Saved in the background is what was there at the call, whatever happens while it is written."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import Mixed, assert_same, boost, child, gpt2, mixed, tokens, train
from safetensors.torch import load_file
from torch import Tensor, nn

from gemini.boosted import boosted as boosted_model
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk.snapshot import Snapshot
from gemini.errors import CheckpointError
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


@pytest.mark.parametrize(
    ("placement", "options"),
    [
        ("copied", {"update_in_backward": True}),
        ("home", {"split_master": True}),
        ("home", {"snapshot_memory": 0}),
        ("disk", {"snapshot_memory": 0}),
    ],
)
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


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_parts_are_saved_in_the_background_too(tmp_path: Path, writer: Writer) -> None:
    booster, model, optimizer = boost(gpt2())
    train(booster, model, optimizer, range(2))
    for folder, is_async in (("now", False), ("later", True)):
        booster.save_model(model, tmp_path / folder, shard=True, size_per_shard="64KiB", use_async=is_async)
        booster.save_optimizer(optimizer, tmp_path / folder, use_async=is_async)  # waits for the one before
    train(booster, model, optimizer, range(2, 4))
    booster.wait_until_finished()
    now, later = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("now", "later"))
    assert len(now) > 4 and now == later


def test_what_is_in_no_chunk_or_in_a_torch_file_is_there_when_the_call_returns(tmp_path: Path, writer: Writer) -> None:
    booster, model, optimizer = boost(gpt2())
    train(booster, model, optimizer, range(1))
    writer.hold()
    booster.save_model(model, tmp_path / "model.pt", use_async=True)
    booster.save_optimizer(optimizer, tmp_path / "optimizer.pt", use_async=True)
    booster.save_model(nn.Linear(2, 2), tmp_path / "plain.safetensors", use_async=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "optimizer.pt", "plain.safetensors"]


class Boom(OSError):
    pass


@pytest.mark.parametrize("told_by", ["step", "backward", "save", "load", "wait"])
def test_an_error_is_told_by_the_next_call_and_costs_nothing(
    told_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    booster, model, optimizer = boost(gpt2())
    train(booster, model, optimizer, range(1))
    booster.save_model(model, tmp_path / "m")
    booster.save_optimizer(optimizer, tmp_path / "o")
    before = weights(tmp_path / "m")
    train(booster, model, optimizer, range(1, 2))
    loss = model(input_ids=tokens(2), labels=tokens(2)).loss
    if told_by == "step":
        booster.backward(loss, optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "read", _boom)
        booster.save_model(model, tmp_path / "m", use_async=True)
        boosted_model(model).manager.snapshots.rest()
    calls: dict[str, Callable[[], object]] = {
        "step": optimizer.step,
        "backward": lambda: booster.backward(loss, optimizer),
        "save": lambda: booster.save_model(model, tmp_path / "m"),
        "load": lambda: booster.load_optimizer(optimizer, tmp_path / "o"),
        "wait": booster.wait_until_finished,
    }
    with pytest.raises(CheckpointError, match=r"save_model to .*m, in the background, failed: .*the disk is away"):
        calls[told_by]()
    assert_same(weights(tmp_path / "m"), before)
    if told_by in ("step", "backward"):
        calls[told_by]()
        booster.backward(model(input_ids=tokens(3), labels=tokens(3)).loss, optimizer)
        optimizer.step()
    booster.save_model(model, tmp_path / "m", use_async=True)
    booster.wait_until_finished()
    found = weights(tmp_path / "m")
    assert_same(found, {name: model.state_dict()[name] for name in found})


def _boom(*args: Any) -> Tensor:
    raise Boom("the disk is away")


def test_an_embedding_that_renormalises_itself_in_its_forward_is_saved_as_it_was(
    tmp_path: Path, writer: Writer
) -> None:
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=0.5), nn.Linear(4, 1))
    booster, model, optimizer = boosted(model, "home", tmp_path)
    with pytest.raises(CheckpointError, match=r"0\.weight was changed in place by a forward"):
        writer.hold()
        booster.save(tmp_path / "later", model=model, use_async=True)
        model(torch.arange(8))
        writer.let_go()
        booster.wait_until_finished()
    optimizer.zero_grad()
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    booster.save(tmp_path / "now", model=model)
    writer.hold()
    booster.save(tmp_path / "later", model=model, use_async=True)
    with torch.no_grad():
        model[0].weight.mul_(100)
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    writer.let_go()
    booster.wait_until_finished()
    assert_same_files(files(tmp_path / "later"), files(tmp_path / "now"))


def test_a_layer_that_is_unfrozen_meanwhile_moves_when_it_is_written(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    booster, model, optimizer = boosted(model, "copied", tmp_path)
    train(booster, model, optimizer, range(2))
    booster.save(tmp_path / "now", model=model, optimizer=optimizer)
    booster.save(tmp_path / "later", model=model, optimizer=optimizer, use_async=True)
    model.transformer.wpe.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.transformer.wpe.parameters())})
    train(booster, model, optimizer, range(2, 4))
    booster.wait_until_finished()
    assert_same_files(files(tmp_path / "later"), files(tmp_path / "now"))


def test_a_bad_amount_of_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="snapshot_memory"):
        GeminiPlugin(snapshot_memory=-1)


@pytest.mark.heavy
def test_accidents_meanwhile_cost_neither_the_save_nor_the_training(tmp_path: Path) -> None:
    names = ("dropped", "interrupted", "interrupted_waiting", "forked", "exit")
    done = child("child_async.py", tmp_path, *names)
    assert done.stdout.splitlines()[-1] == "the end"
    for name in names:
        assert_same_files(files(tmp_path / name / "later"), files(tmp_path / name / "now"))


@pytest.mark.heavy
def test_the_end_of_the_process_waits_for_what_reads_the_disk_tier(tmp_path: Path) -> None:
    child("child_async.py", tmp_path, "exit_disk")
    assert_same_files(files(tmp_path / "exit_disk" / "later"), files(tmp_path / "exit_disk" / "now"))


@pytest.mark.heavy
def test_an_error_that_nobody_was_told_of_is_logged_at_the_end(tmp_path: Path) -> None:
    done = child("child_async.py", tmp_path, "failed")
    assert "in the background, failed" in done.stderr and "No such file" in done.stderr
    assert not list((tmp_path / "failed" / "later").glob("checkpoint-*"))


@pytest.mark.heavy
def test_a_killed_process_leaves_what_was_there_before(tmp_path: Path) -> None:
    assert child("child_async.py", tmp_path, "killed", check=False).returncode == -9
    assert not list((tmp_path / "killed" / "later").glob("checkpoint-*"))
    booster, model, optimizer = boost(nn.Sequential(*(nn.Linear(32, 32) for _ in range(32))), "bf16")
    booster.load(tmp_path / "killed" / "now", model=model, optimizer=optimizer)
    booster.save(tmp_path / "killed" / "later", model=model, optimizer=optimizer, use_async=True)
    booster.wait_until_finished()
    assert [path.name for path in (tmp_path / "killed" / "later").glob(".*")] == []
    assert_same_files(files(tmp_path / "killed" / "later"), files(tmp_path / "killed" / "now"))
