"""Optimizers that look at whole parameters: the bits of plain torch, wherever the chunks are."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.optimization import Adafactor

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.boosting import refusals
from gemini.chunk import Tier
from gemini.errors import OutOfMemory
from gemini.nn.optimizer import register_whole_parameter
from gemini.nn.optimizer.rules import whole, whole_rule

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

VOCABULARY = 200
PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "300KiB", "chunk_config_dict": {1: {"chunk_size": 1024}}},
    "disk": {"host_memory": "1MiB", "chunk_config_dict": {1: {"chunk_size": 1024}}},
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Muon": (torch.optim.Muon, {"lr": 1e-2}),
    "Muon as AdamW": (torch.optim.Muon, {"lr": 1e-2, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2, "weight_decay": 0.1}),
    "Adafactor foreach": (torch.optim.Adafactor, {"lr": 1e-2, "foreach": True, "maximize": True}),
    "transformers' Adafactor": (Adafactor, {"lr": None, "warmup_init": True}),
    "with its first moment": (
        Adafactor,
        {"lr": 1e-3, "relative_step": False, "scale_parameter": False, "beta1": 0.9, "weight_decay": 0.01},
    ),
}


def build() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_head=2, n_layer=4, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def batch(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))


class Run:
    """A GPT-2 in plain torch, or boosted. Muon takes matrices, and torch's AdamW steps the rest as it is."""

    def __init__(self, name: str, place: dict[str, Any] | None, precision: str = "fp32", **plugin: Any) -> None:
        cls, options = CASES[name]
        self.model: Any = build()
        matrices = [p for key, p in self.model.named_parameters() if p.dim() == 2 and ".h." in key]
        others = [p for p in self.model.parameters() if all(p is not matrix for matrix in matrices)]
        self.rest: Optimizer | None = torch.optim.AdamW(others, lr=1e-3) if cls is torch.optim.Muon else None
        parameters = matrices if self.rest is not None else [*matrices, *others]
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": options["lr"] and 5e-3}]
        self.optimizer: Any = cls(groups, **options)
        self.booster: Booster | None = None
        if place is not None:
            self.booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **place, **plugin))
            self.model, self.optimizer, *_ = self.booster.boost(self.model, self.optimizer)

    def backward(self, step: int) -> float:
        tokens = batch(step)
        loss = self.model(input_ids=tokens, labels=tokens).loss
        if self.booster is not None:
            self.booster.backward(loss, self.optimizer)
        else:
            loss.backward()
        return float(loss.detach())

    def finish(self) -> None:
        for optimizer in (self.optimizer, self.rest):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

    def step(self, number: int) -> float:
        loss = self.backward(number)
        self.finish()
        return loss


def check_same(ours: Run, plain: Run) -> None:
    weights = ours.model.state_dict()
    assert not [key for key, value in plain.model.state_dict().items() if not torch.equal(weights[key], value)]
    found, expected = ours.optimizer.state_dict(), plain.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert list(found["state"][index]) == list(state)
        for name, value in state.items():
            mine = found["state"][index][name]
            assert type(mine) is type(value)
            assert torch.equal(mine, value) if isinstance(value, Tensor) else mine == value, (index, name)


def placed(place: str, folder: Path) -> dict[str, Any]:
    return {**PLACES[place], **({"offload_dir": folder} if place == "disk" else {})}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_training_has_the_bits_of_plain_torch_wherever_the_chunks_are(name: str, place: str, tmp_path: Path) -> None:
    ours, plain = Run(name, placed(place, tmp_path)), Run(name, None)
    homes = [home for chunk in ours.model._gemini.manager.chunks for home in chunk.homes.values()]
    assert any(part.tier is Tier.DISK for home in homes for part in home.parts) == (place == "disk")
    runs = (ours, plain)
    schedulers = [lr_scheduler.StepLR(run.optimizer, 2, 0.5) for run in runs] if "lr" in CASES[name][1] else []
    if CASES[name][1]["lr"] is None:
        schedulers = []
    for step in range(4):
        assert ours.backward(step) == plain.backward(step)
        if step == 2:
            norms = [nn.utils.clip_grad_norm_(run.model.parameters(), 0.1) for run in runs]
            assert torch.equal(*norms)
        for run in runs:
            run.finish()
        for scheduler in schedulers:
            scheduler.step()
    check_same(ours, plain)


@pytest.mark.parametrize("name", ["Muon", "Adafactor", "with its first moment"])
def test_a_run_goes_on_from_a_checkpoint_and_with_plain_torch(name: str, tmp_path: Path) -> None:
    straight = Run(name, None)
    losses = [straight.step(step) for step in range(5)]
    ours = Run(name, placed("disk", tmp_path))
    assert [ours.step(step) for step in range(2)] == losses[:2]
    assert ours.booster is not None
    rest = None if ours.rest is None else copy.deepcopy(ours.rest.state_dict())
    ours.booster.save(tmp_path / "run", model=ours.model, optimizer=ours.optimizer, use_async=True)
    ours.step(2)  # meanwhile: what is written is what was there
    ours.booster.wait_until_finished()

    again = Run(name, {})
    assert again.booster is not None
    again.booster.load(tmp_path / "run", model=again.model, optimizer=again.optimizer)
    if again.rest is not None and rest is not None:
        again.rest.load_state_dict(rest)
    assert [again.step(step) for step in (2, 3)] == losses[2:4]

    plain = Run(name, None)
    plain.model.load_state_dict({key: value.clone() for key, value in again.model.state_dict().items()})
    plain.optimizer.load_state_dict(again.optimizer.state_dict())
    if plain.rest is not None and again.rest is not None:
        plain.rest.load_state_dict(copy.deepcopy(again.rest.state_dict()))
    assert plain.step(4) == losses[4]
    other = Run(name, {})
    other.model.load_state_dict({key: value.clone() for key, value in again.model.state_dict().items()})
    other.optimizer.load_state_dict(again.optimizer.state_dict())
    if other.rest is not None and again.rest is not None:
        other.rest.load_state_dict(copy.deepcopy(again.rest.state_dict()))
    assert other.step(4) == losses[4]
    check_same(other, straight)
    check_same(plain, straight)


def test_states_beside_the_chunks_are_shown_and_edits_count() -> None:
    runs = Run("Adafactor", {}), Run("Adafactor", None)
    for run in runs:
        run.step(0)
        first = run.model.transformer.h[0].attn.c_attn.weight
        assert list(run.optimizer.state[first]) == ["step", "row_var", "col_var"]
        assert run.optimizer.state[first]["row_var"].shape == (64, 1)
        with torch.no_grad():
            run.optimizer.state[first]["row_var"].mul_(2.0)
        second = run.model.transformer.h[1].attn.c_attn.weight
        run.optimizer.state[second]["col_var"] = torch.full((1, 192), 0.5)
        run.optimizer.state.pop(run.model.transformer.h[2].attn.c_attn.weight)
    assert runs[0].step(1) == runs[1].step(1)
    check_same(*runs)
    with pytest.raises(ValueError, match=r"row_var of this parameter has the shape \(64, 1\), got \(64,\)"):
        runs[0].optimizer.state[runs[0].model.transformer.h[0].attn.c_attn.weight]["row_var"] = torch.ones(64)


def test_a_saved_state_of_another_shape_is_refused_before_anything_changes() -> None:
    run = Run("Adafactor", {})
    run.step(0)
    saved, before = run.optimizer.state_dict(), run.optimizer.state_dict()
    saved["state"][0]["row_var"] = torch.ones(7, 1)
    with pytest.raises(ValueError, match=r"row_var of parameter 0: saved \(7, 1\), expected"):
        run.optimizer.load_state_dict(saved)
    assert torch.equal(run.optimizer.state_dict()["state"][0]["row_var"], before["state"][0]["row_var"])


@pytest.mark.parametrize("place", ["resident", "disk"])
def test_memory_that_runs_out_in_an_update_costs_nothing(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = Run("Adafactor", placed(place, tmp_path)), Run("Adafactor", None)
    for run in (ours, plain):
        run.step(0)
    ours.model._gemini.manager.settle()
    numbers, calls, run_step = {0, 3, 4, 9}, iter(range(1 << 30)), whole_rule.WholeRule.run

    def failing(self: Any, *args: Any) -> Any:
        done = run_step(self, *args)
        if next(calls) in numbers:
            raise MemoryError("no memory")
        return done

    monkeypatch.setattr(whole_rule.WholeRule, "run", failing)
    assert ours.step(1) == plain.step(1)
    errors = 0
    for _ in range(20):
        try:
            ours.model._gemini.manager.settle()
            break
        except OutOfMemory:
            errors += 1
    assert errors >= 1
    monkeypatch.undo()
    assert ours.step(2) == plain.step(2)
    check_same(ours, plain)


def test_update_in_backward_and_half_precision_train() -> None:
    ours, plain = Run("Adafactor", {}, update_in_backward=True), Run("Adafactor", None)
    for step in range(3):
        assert ours.step(step) == plain.step(step)
    check_same(ours, plain)
    low = Run("Adafactor", {}, "bf16")
    assert low.step(1) > [low.step(1) for _ in range(8)][-1]


# -- refusals, and registering


class Normed(Optimizer):
    """Divides each gradient by its norm, as LARS and LAMB do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad / p.grad.norm().clamp_(min=1e-9), alpha=-group["lr"])


class Noted(Normed):
    """Keeps a number that nobody knows of."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["norm"] = p.norm()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(whole, "_KINDS", dict(whole._KINDS))
    yield


def test_a_registered_optimizer_gets_whole_parameters(registry: None) -> None:
    models = [nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 5)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers: list[Any] = [Normed(model.parameters()) for model in models]
    plugin = GeminiPlugin(precision="fp32", telemetry=False)
    with pytest.raises(TypeError, match="Normed, which is not known"):
        Booster(plugin=plugin).boost(models[0], optimizers[0])
    register_whole_parameter(Normed, [])
    models[0], optimizers[0], *_ = Booster(plugin=plugin).boost(models[0], optimizers[0])
    for step in range(3):
        inputs = torch.randn(4, 40, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, optimizers, strict=True):
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    found = models[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in models[1].state_dict().items())


def test_states_that_are_not_registered_are_found(registry: None) -> None:
    register_whole_parameter(Noted, [])
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"Noted keeps .*norm.* of each parameter; it is registered with \{\}"):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(model, Noted(model.parameters()))
    register_whole_parameter(Normed, [])
    with pytest.raises(ValueError, match="Normed is known already"):
        register_whole_parameter(Normed, [])


def test_parts_of_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="Muon looks at whole parameters, and with 2 ranks"):
        refusals.refuse_whole(nn.Linear(2, 2), "Muon", 2)
