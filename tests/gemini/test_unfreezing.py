"""Layers that are unfrozen in the middle of training, with plain PyTorch's bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradual
import pytest
import torch
from gradual import DTYPES, OPTIONS, PLUGINS, Gradual, check_same, parts, rounded, stages
from loop import PLACEMENTS, SMALL, WIDTH, Trained, batch
from parity import check_at_rest, masters
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MASTER, Tier
from gemini.nn.optimizer import HybridAdam
from gemini.telemetry.documents import read_chunks

pytestmark = pytest.mark.timeout(120)

STEPS, UNFROZEN_AT = 6, 3


def train_plain(precision: str) -> tuple[list[float], dict[str, Tensor]]:
    model = rounded(precision).to(DTYPES[precision])
    head, rest = parts(model)
    for parameter in rest:
        parameter.requires_grad_(False)
    optimizer = HybridAdam(head, **OPTIONS)
    losses = []
    for step in range(STEPS):
        if step == UNFROZEN_AT:
            for parameter in rest:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": rest, "lr": 3e-3})
        torch.manual_seed(step)
        loss = model(batch(step).to(DTYPES[precision])).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: optimizer.state[p].get("master", p).detach() for n, p in model.named_parameters()}


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("placement", "in_backward", "precision"),
    [
        ("resident", False, "fp32"),
        ("resident", True, "bf16"),
        ("streamed", True, "fp32"),
        ("streamed", False, "bf16"),
        ("disk", False, "fp32"),
        ("disk", True, "bf16"),
    ],
)
def test_what_is_frozen_after_boosting_is_unfrozen_with_the_bits_of_plain_pytorch(
    placement: str, in_backward: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = rounded(precision)
    head, rest = parts(model)
    optimizer: Any = HybridAdam([{"params": head}, {"params": rest, "lr": 3e-3}], **OPTIONS)
    plugin = GeminiPlugin(precision=precision, telemetry=False, update_in_backward=in_backward, **PLACEMENTS[placement])
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, optimizer)
    for parameter in rest:
        parameter.requires_grad_(False)
    losses = []
    for step in range(STEPS):
        if step == UNFROZEN_AT:
            assert len(optimizer.state_dict()["state"]) == len(head)
            for parameter in rest:
                parameter.requires_grad_(True)
        torch.manual_seed(step)
        loss = model(batch(step)).float().square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected_losses, expected = train_plain(precision)
    assert losses == expected_losses
    found = masters(model)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value.float())] == []
    assert len(optimizer.state_dict()["state"]) == len(head) + len(rest)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("placement", "precision", "in_backward", "in_group"),
    [
        (placement, precision, in_backward, in_group)
        for i, placement in enumerate(PLUGINS)
        for precision, in_backward, in_group in (
            (("fp32", False, False), ("bf16", True, True)),
            (("bf16", False, True), ("fp32", True, False)),
        )[i % 2]
    ],
)
def test_layers_unfrozen_one_after_the_other_train_with_the_bits_of_plain_pytorch(
    placement: str, precision: str, in_backward: bool, in_group: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = Gradual("adam", precision, None, in_group)
    ours = Gradual("adam", precision, {**PLUGINS[placement], "update_in_backward": in_backward}, in_group)
    assert ours.train() == plain.train()
    check_same(ours, plain)
    check_at_rest(ours.model)
    states, expected = ours.optimizer.state_dict()["state"], plain.optimizer.state_dict()["state"]
    assert states.keys() == expected.keys()
    assert all(torch.equal(states[i]["exp_avg_sq"], expected[i]["exp_avg_sq"]) for i in expected)
    assert all(states[i]["step"] == expected[i]["step"] for i in expected)


@pytest.mark.parametrize("kind", ["bf16 states", "adagrad", "sgd", "plain sgd"])
def test_other_states_get_room_too(kind: str) -> None:
    for plugin in (PLUGINS["one chunk"], SMALL):
        plain, ours = Gradual(kind, "fp32", None), Gradual(kind, "fp32", plugin)
        assert ours.train() == plain.train()
        check_same(ours, plain)


def test_unfrozen_masters_are_split_where_others_are() -> None:
    whole, ours = Gradual("adam", "bf16", SMALL), Gradual("adam", "bf16", {**SMALL, "split_master": True})
    assert ours.train() == whole.train()
    check_same(ours, whole)
    assert all(chunk.is_split == chunk.is_trainable for chunk in boosted(ours.model).manager.chunks)


CLIPPING: dict[str, Callable[[Gradual], None]] = {
    "by norm": lambda run: run.optimizer.clip_grad_by_norm(1e-4) and None,
    "by value": lambda run: run.optimizer.clip_grad_by_value(1e-4),
    "by the plugin": lambda run: None,
    "by torch": lambda run: torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-4) and None,
}


@pytest.mark.parametrize("how", CLIPPING)
def test_what_was_just_unfrozen_is_clipped_with_the_rest(how: str) -> None:
    plugin = {**SMALL, **({"max_norm": 1e-4} if how == "by the plugin" else {})}
    ours = Gradual("adam", "fp32", plugin, in_group=True)
    ours.step(0)
    ours.unfreeze(1)
    ours.backward(1)
    CLIPPING[how](ours)
    ours.optimizer.step()
    states = ours.optimizer.state_dict()["state"]
    assert len(states) == len(ours.stages[0]) + len(ours.stages[1])
    for index in range(len(ours.stages[0]), len(states)):
        moment = states[index]["exp_avg"]  # a tenth of the gradient, after one step
        assert 0 < float(moment.abs().max()) <= 0.1 * 1e-4 * 1.001


def test_what_is_in_no_group_keeps_its_gradient_and_its_values() -> None:
    plain, ours = Gradual("adam", "bf16", None), Gradual("adam", "bf16", PLUGINS["one chunk"])
    for run in (plain, ours):
        run.step(0)
        run.unfreeze(1)
        for parameter in run.stages[2]:
            parameter.requires_grad_(True)
    losses = [[run.step(step) for step in range(1, 4)] for run in (plain, ours)]
    assert losses[0] == losses[1]
    check_same(ours, plain)
    for a, b in zip(ours.stages[2], plain.stages[2], strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_parameters_may_be_added_before_they_require_gradients() -> None:
    plain, ours = Gradual("adam", "fp32", None), Gradual("adam", "fp32", SMALL)
    losses = []
    for run in (plain, ours):
        run.optimizer.add_param_group({"params": run.stages[1], "lr": 1e-3})
        assert not any(parameter.requires_grad for parameter in run.stages[1])
        first = run.step(0)
        for parameter in run.stages[1]:
            parameter.requires_grad_(True)
        losses.append([first, run.step(1), run.step(2)])
    assert losses[0] == losses[1]
    check_same(ours, plain)


def test_what_is_in_no_chunk_can_be_added_however_little_room_there_is() -> None:
    ours = Trained({"host_memory": "312KiB", **SMALL}, "bf16")
    double = nn.Parameter(torch.ones(4, dtype=torch.float64))
    ours.optimizer.add_param_group({"params": [double]})  # before the first step, when nothing is known of the ring
    double.grad = torch.ones(4, dtype=torch.float64)
    ours.step(0)
    assert (double < 1.0).all()


class Penalised(nn.Module):
    """The loss uses the parameters of a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.penalised = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).square().mean()

    def penalty(self) -> Tensor:
        return self.penalised.weight.square().sum() + self.penalised.bias.square().sum()


def test_what_the_loss_alone_uses_is_unfrozen_and_updated_in_backward() -> None:
    plain, model = Penalised(), Penalised()
    optimizers: list[Any] = []
    for each in (plain, model):
        each.penalised.requires_grad_(False)
        optimizers.append(HybridAdam(each.used.parameters(), **OPTIONS))
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, update_in_backward=True))
    ours, optimizers[1], *_ = booster.boost(model, optimizers[1])
    for each, optimizer in zip((plain, ours), optimizers, strict=True):
        for step in range(4):
            if step == 2:
                each.penalised.requires_grad_(True)
                optimizer.add_param_group({"params": list(each.penalised.parameters())})
            loss = each(torch.randn(2, 8, generator=torch.Generator().manual_seed(step))) + each.penalty()
            loss.backward() if each is plain else booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    found = masters(ours)
    assert not [name for name, value in plain.named_parameters() if not torch.equal(found[name], value)]


def test_a_graph_from_before_is_run_after() -> None:
    plain, ours = Gradual("adam", "bf16", None), Gradual("adam", "bf16", SMALL)
    for run in (plain, ours):
        run.step(0)
        torch.manual_seed(1)
        loss = run.model(batch(1).to(run.dtype)).float().square().mean()
        run.unfreeze(1)
        if run.booster is not None:
            run.booster.backward(loss, run.optimizer)
        else:
            loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step(2)
    check_same(ours, plain)


def test_statistics_the_record_and_checkpoints_know_what_was_unfrozen(tmp_path: Path) -> None:
    def boost(folder: Any) -> Gradual:
        run = Gradual("adam", "fp32", {})
        run.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=folder, **SMALL))
        model: Any = rounded("fp32")
        run.stages = stages(model)
        for stage in run.stages[1:]:
            for parameter in stage:
                parameter.requires_grad_(False)
        optimizer: Any = HybridAdam(run.stages[0], **OPTIONS)
        run.model, run.optimizer, *_ = run.booster.boost(model, optimizer)
        return run

    run = boost(tmp_path / "run")
    for step in range(2):
        run.step(step)
    before = run.model.memory_stats()
    heaviest = boosted(run.model).engine.sampling.profile.heaviest
    assert True in heaviest
    run.unfreeze(1)
    assert True not in heaviest  # layers that had no graph take more activations
    run.step(1)
    stats = run.model.memory_stats()
    unfrozen = {chunk.index: chunk for p in run.stages[1] if (chunk := boosted(run.model).manager.find(p)[0])}
    numel = sum(chunk.layout.numel for chunk in unfrozen.values())
    assert stats["model_data/optimizer_bytes"] == before["model_data/optimizer_bytes"] + 8 * numel
    assert stats["host/used_bytes"] == before["host/used_bytes"] + 12 * numel  # and a gradient
    packing = boosted(run.model).packing
    homes = sum(home.nbytes for c in boosted(run.model).manager.chunks for home in c.homes.values())
    gradients = sum(c.gradient.buffer.nbytes for c in boosted(run.model).manager.chunks if c.gradient is not None)
    assert packing.placement.nbytes[Tier.HOST] == homes + gradients
    telemetry = boosted(run.model).telemetry
    assert telemetry is not None
    telemetry.close()
    chunks = read_chunks(tmp_path / "run", 0)
    assert chunks is not None
    assert all("exp_avg" in chunks.chunks[index].homes for index in unfrozen)

    run.booster.save_model(run.model, tmp_path / "model")  # type: ignore[union-attr]
    run.booster.save_optimizer(run.optimizer, tmp_path / "optimizer")  # type: ignore[union-attr]
    again = boost(False)
    again.unfreeze(1)
    again.booster.load_model(again.model, tmp_path / "model")  # type: ignore[union-attr]
    again.booster.load_optimizer(again.optimizer, tmp_path / "optimizer")  # type: ignore[union-attr]
    assert again.step(2) == run.step(2)
    check_same(again, run)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 128), *(nn.Linear(128, 128) for _ in range(8)), nn.Linear(128, 3))


def test_layers_are_unfrozen_where_they_are_on_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gradual, "build", wide)
    small = {**SMALL, "host_memory": "500KiB", "offload_dir": "disk", "update_in_backward": True}
    plain, ours = Gradual("plain sgd", "fp32", None), Gradual("plain sgd", "fp32", small)
    assert [ours.step(step) for step in range(2)] == [plain.step(step) for step in range(2)]
    manager = boosted(ours.model).manager
    assert manager.disk is not None
    ledger, in_ram = manager.ledger, sum(c.homes[MASTER].nbytes for c in manager.chunks[:2])
    ledger.resize(Tier.DISK, 0)  # to what is used
    size, frozen = manager.disk.file.nbytes, [c for c in manager.chunks if c.tier is Tier.DISK and not c.is_trainable]
    assert ledger.free(Tier.DISK) == 0 and len(frozen) > 2
    before = ledger.capacity(Tier.HOST)
    for stage in range(1, len(plain.stages)):
        manager.eviction.evict_idle()
        ledger.resize(Tier.HOST, ledger.used(Tier.HOST) + boosted(ours.model).engine.pacing.least_bytes({}) + in_ram)
        for run in (ours, plain):
            run.unfreeze(stage)
        ledger.resize(Tier.HOST, before)
        assert ours.step(stage + 1) == plain.step(stage + 1)
    assert all(chunk.is_trainable and chunk.tier is Tier.DISK for chunk in frozen)
    assert ledger.used(Tier.DISK) == manager.disk.file.nbytes == size
    check_same(ours, plain)
    check_at_rest(ours.model)
