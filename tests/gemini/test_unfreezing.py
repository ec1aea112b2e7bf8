"""Layers that are unfrozen in the middle of training: what is refused, and the way out, with plain PyTorch's bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import PLACEMENTS, SMALL, batch, build
from parity import check_at_rest, masters
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Role, Tier
from gemini.errors import OutOfMemory
from gemini.nn.optimizer import HybridAdam
from gemini.telemetry.documents import read_chunks

pytestmark = pytest.mark.timeout(120)

STEPS, UNFROZEN_AT = 6, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def rounded(precision: str) -> nn.Module:
    """A model whose values both dtypes can hold."""
    model = build()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision]).float()
    return model


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What trains from the start, and what is frozen at first: every other layer."""
    layers = [module for module in model if list(module.parameters())]  # type: ignore[attr-defined]
    return tuple([p for layer in layers[i::2] for p in layer.parameters()] for i in (1, 0))  # type: ignore[return-value]


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


# -- frozen, or in no group, when boosted


def optimizer_of(kind: str) -> Callable[[Any], Any]:
    return {
        "adam": lambda groups: HybridAdam(groups, **OPTIONS),
        "bf16 states": lambda groups: HybridAdam(groups, **OPTIONS, states="bf16"),
        "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2, initial_accumulator_value=0.5),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
        "plain sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    }[kind]


def stages(model: Any) -> list[list[nn.Parameter]]:
    """Layers from the last to the first, two at a time: what is unfrozen at a time."""
    layers = [module for module in model if list(module.parameters())]
    return [[p for layer in layers[i : i + 2] for p in layer.parameters()] for i in range(len(layers) - 2, -1, -2)]


class Gradual:
    """Unfreezes a stage every two steps, each in a group with a learning rate of its own."""

    def __init__(self, kind: str, precision: str, plugin: dict[str, Any] | None, in_group: bool = False) -> None:
        model: Any = rounded(precision)
        if plugin is None:
            model = model.to(DTYPES[precision])
        self.stages = stages(model)
        for stage in self.stages[1:]:
            for parameter in stage:
                parameter.requires_grad_(False)
        groups = [{"params": self.stages[0]}]
        if in_group:
            groups += [{"params": stage, "lr": self.rate(i)} for i, stage in enumerate(self.stages) if i]
        optimizer: Any = optimizer_of(kind)(groups)
        self.booster = None
        self.in_group = in_group
        if plugin is not None:
            self.booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **plugin))
            model, optimizer, *_ = self.booster.boost(model, optimizer)
        self.model, self.optimizer, self.dtype = model, optimizer, DTYPES[precision]

    @staticmethod
    def rate(stage: int) -> float:
        return 1e-2 / (stage + 1)

    def unfreeze(self, stage: int) -> None:
        for parameter in self.stages[stage]:
            parameter.requires_grad_(True)
        if not self.in_group:
            self.optimizer.add_param_group({"params": self.stages[stage], "lr": self.rate(stage)})

    def backward(self, step: int) -> float:
        torch.manual_seed(step)
        loss = self.model(batch(step).to(self.dtype)).float().square().mean()
        if self.booster is not None:
            self.booster.backward(loss, self.optimizer)
        else:
            loss.backward()
        return loss.item()

    def step(self, step: int) -> float:
        loss = self.backward(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def train(self) -> list[float]:
        losses = []
        for step in range(2 * len(self.stages)):
            if step and step % 2 == 0:
                self.unfreeze(step // 2)
            losses.append(self.step(step))
        return losses

    def weights(self) -> dict[str, Tensor]:
        if self.booster is not None:
            return {name: value.float() for name, value in masters(self.model).items()}
        state = self.optimizer.state
        return {n: state.get(p, {}).get("master", p).detach().float() for n, p in self.model.named_parameters()}


def check_same(ours: Gradual, plain: Gradual) -> None:
    found = ours.weights()
    assert [name for name, value in plain.weights().items() if not torch.equal(found[name], value)] == []


PLUGINS: dict[str, dict[str, Any]] = {
    "resident": {},
    "one chunk": {"chunk_config_dict": {1: {"chunk_size": 1 << 20}}},
    "streamed": PLACEMENTS["streamed"],
    "an emulated device": {"device_memory": "2MiB"},
    "disk": {**PLACEMENTS["disk"], "host_memory": "400KiB"},
}


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
    heaviest = boosted(run.model).runtime.profile.heaviest
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


# -- what cannot be


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
    manager, runtime = boosted(roomy.model).manager, boosted(roomy.model).runtime
    old = sum(chunk.homes[Role.MASTER].nbytes for chunk in {manager.find(p)[0] for p in roomy.stages[1]})  # type: ignore[index]
    roomy.unfreeze(1)
    resident = sum(chunk.full_nbytes for chunk in manager.chunks if chunk.is_resident)
    enough = (
        manager.ledger.used(Tier.HOST) - resident + runtime.least_bytes({}) + old
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
