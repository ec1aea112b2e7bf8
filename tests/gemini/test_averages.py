"""Running averages in chunks have the bits of torch's `AveragedModel` over a plain model."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import gemini
from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.errors import CheckpointError, OutOfMemory
from gemini.nn.optimizer import HybridAdam

DECAY = 0.9
FORMS: dict[str, tuple[Callable[..., Any], Callable[[nn.Module], AveragedModel]]] = {
    "ema": (lambda m: gemini.EMA(m, DECAY), lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(DECAY))),
    "swa": (gemini.SWA, AveragedModel),
}
TIERS: dict[str, dict[str, Any]] = {
    "home": {},
    "copied": {"device_memory": "64KiB", "chunk_config_dict": {1: {"chunk_size": 2048}}},
    "disk": {"device_memory": "64KiB", "host_memory": "320KiB", "chunk_config_dict": {1: {"chunk_size": 2048}}},
}


class Model(nn.Module):
    """With a head for each of two tasks, frozen, tied and fp64 parameters, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 48)
        self.norm = nn.BatchNorm1d(48)
        self.body = nn.Sequential(*(nn.Linear(48, 48) for _ in range(9)))
        self.frozen = nn.Linear(48, 48).requires_grad_(False)
        self.heads = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))
        self.tied = nn.Linear(48, 48)
        self.tied.weight = self.heads[0].weight
        self.wide = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def forward(self, inputs: Tensor, task: int = 0) -> Tensor:
        hidden = self.frozen(self.body(self.norm(self.first(inputs)).relu()).relu())
        return self.tied(self.heads[task](hidden)) * self.wide.sum().to(hidden.dtype)


def made() -> Model:
    torch.manual_seed(0)
    return Model()


def optimizer_of(model: nn.Module) -> HybridAdam:
    return HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def boost(tiers: str, folder: Path, precision: str = "fp32", **options: Any) -> tuple[Booster, Any, Any]:
    options = TIERS[tiers] | ({"offload_dir": folder} if tiers == "disk" else {}) | options
    booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, **options))
    model = made()
    model, optimizer, *_ = booster.boost(model, optimizer_of(model))
    return booster, model, optimizer


def batch(step: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step))


def train(booster: Booster | None, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        loss = model(batch(step), step % 2).float().square().mean()  # the other head has no gradient
        booster.backward(loss, optimizer) if booster is not None else loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def values(average: Any) -> dict[str, Tensor]:
    return dict(average.named_tensors())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.one_in(2)
@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("form", FORMS)
def test_averages_have_the_bits_of_torchs_over_a_plain_model(form: str, tiers: str, tmp_path: Path) -> None:
    ours, torchs = FORMS[form]
    plain = made()
    plain_optimizer, averaged = optimizer_of(plain), torchs(plain)
    booster, model, optimizer = boost(tiers, tmp_path)
    average = ours(model)
    for step in range(5):
        train(booster, model, optimizer, range(step, step + 1))
        train(None, plain, plain_optimizer, range(step, step + 1))
        averaged.update_parameters(plain)
        assert_same(values(average), dict(averaged.module.named_parameters()))
    assert average.n_averaged == averaged.n_averaged == 5
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()))
    on = {chunk.plan.tiers[average.name] for chunk in boosted(model).manager.chunks if chunk.is_trainable}
    assert (Tier.DISK in on) == (tiers == "disk")

    with average.swapped_in() as same:
        assert same is model
        averaged.module.load_state_dict(dict(model.named_buffers()), strict=False)
        assert torch.equal(model.eval()(batch(9)), averaged.eval()(batch(9)))
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()))
    train(booster, model.train(), optimizer, range(5, 7))
    train(None, plain, plain_optimizer, range(5, 7))
    assert_same(dict(model.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize(
    ("tiers", "precision", "options"),
    [
        ("copied", "bf16", {}),
        ("disk", "fp16", {"initial_scale": 2.0**4}),
        ("home", "bf16", {"split_master": True}),
        ("copied", "bf16", {"update_in_backward": True}),
        ("home", "fp32", {"max_norm": 0.1}),
    ],
)
def test_an_average_is_of_the_masters(tiers: str, precision: str, options: dict[str, Any], tmp_path: Path) -> None:
    booster, model, optimizer = boost(tiers, tmp_path, precision, **options)
    average = gemini.EMA(model, DECAY)
    expected: dict[str, Tensor] = {}
    for step in range(4):
        train(booster, model, optimizer, range(step, step + 1))
        masters = {n: v for n, v in gemini.named_tensors(model) if n in dict(model.named_parameters())}
        expected = {n: expected[n].lerp_(v, 1 - DECAY) if expected else v for n, v in masters.items()}
        assert_same(values(average), expected)
    with average.swapped_in():
        assert_same({n: v for n, v in gemini.named_tensors(model) if n in expected}, expected)
    assert_same({n: v for n, v in gemini.named_tensors(model) if n in expected}, masters)


def test_two_averages_follow_one_model_and_one_ends(tmp_path: Path) -> None:
    booster, model, optimizer = boost("copied", tmp_path)
    ledger = boosted(model).manager.ledger
    fast = gemini.EMA(model, 0.5, name="fast")
    used = ledger.used(Tier.HOST), ledger.used(Tier.DEVICE)
    slow = gemini.EMA(model, 0.9, name="slow")
    with pytest.raises(ValueError, match="'slow' cannot be the name"):
        gemini.EMA(model, name="slow")
    train(booster, model, optimizer, range(3))
    assert not torch.equal(slow.read(model.first.weight), fast.read(model.first.weight))
    before = values(fast)
    slow.close()
    optimizer.zero_grad()
    boosted(model).manager.eviction.evict_idle()
    assert ledger.used(Tier.HOST) <= used[0]
    assert_same(values(fast), before)
    with pytest.raises(RuntimeError, match="the average slow has been closed"):
        slow.read(model.first.weight)
    train(booster, model, optimizer, range(3, 5))
    assert fast.n_averaged == 5
    with pytest.raises(ValueError, match=r"running averages \(fast\), which would be lost"):
        gemini.to_torch(model)
    fast.close()
    gemini.to_torch(model)


@pytest.mark.parametrize("use_async", [False, True])
def test_it_is_saved_with_the_model_and_goes_on_bit_for_bit(use_async: bool, tmp_path: Path) -> None:
    booster, model, optimizer = boost("copied", tmp_path)
    average = gemini.EMA(model, DECAY)
    train(booster, model, optimizer, range(3))
    booster.save(tmp_path / "run", model=model, optimizer=optimizer, use_async=use_async)
    train(booster, model, optimizer, range(3, 6))
    booster.wait_until_finished()

    other_booster, other, other_optimizer = boost("disk", tmp_path)
    restored = gemini.EMA(other, DECAY)
    other_booster.load(tmp_path / "run", model=other, optimizer=other_optimizer)
    assert restored.n_averaged == 3
    with restored.swapped_in():
        other_booster.save_model(other, tmp_path / "weights.safetensors")
    plain = made()
    other_booster.load_model(plain, tmp_path / "weights.safetensors")
    assert_same(dict(plain.named_parameters()), values(restored))
    other_booster.load_model(plain, tmp_path / "run" / "latest" / "ema.safetensors")
    assert_same(dict(plain.named_parameters()), values(restored))
    train(other_booster, other, other_optimizer, range(3, 6))
    assert_same(values(restored), values(average))


def test_a_checkpoint_without_the_average_is_an_error_unless_it_is_not_asked_for(tmp_path: Path) -> None:
    booster, model, optimizer = boost("home", tmp_path)
    booster.save(tmp_path / "run", model=model, optimizer=optimizer)
    average = gemini.EMA(model, DECAY)
    train(booster, model, optimizer, range(1))
    before = values(average)
    with pytest.raises(CheckpointError, match=r"none of the files ema\.safetensors"):
        booster.load(tmp_path / "run", model=model, optimizer=optimizer)
    assert_same(values(average), before)
    booster.load(tmp_path / "run", model=model, optimizer=optimizer, strict=False)
    assert average.n_averaged == 1


def test_state_dicts_are_those_of_torchs(tmp_path: Path) -> None:
    booster, model, optimizer = boost("copied", tmp_path)
    average = gemini.EMA(model, DECAY)
    train(booster, model, optimizer, range(3))
    averaged = AveragedModel(made(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.load_state_dict(average.state_dict(), strict=False)
    assert averaged.n_averaged == 3
    assert_same(dict(averaged.module.named_parameters()), values(average))
    train(booster, model, optimizer, range(3, 4))
    average.load_state_dict(averaged.state_dict())
    assert average.n_averaged == 3
    assert_same(values(average), dict(averaged.module.named_parameters()))


def test_what_would_train_the_average_is_refused(tmp_path: Path) -> None:
    booster, model, optimizer = boost("home", tmp_path)
    average = gemini.EMA(model, DECAY)
    train(booster, model, optimizer, range(1))
    before = dict(gemini.named_tensors(model.eval()))
    with pytest.raises(KeyError), average.swapped_in():
        with pytest.raises(RuntimeError, match="cannot step while the parameters have the values of their average"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="cannot run backward"):
            booster.backward(model(batch(1)).sum(), optimizer)
        with pytest.raises(RuntimeError, match="cannot swap an average in"), average.swapped_in():
            pass
        with pytest.raises(RuntimeError, match=r"cannot save a checkpoint of a training run while"):
            booster.save(tmp_path / "run", model=model, optimizer=optimizer)
        raise KeyError("of the user")
    assert_same(dict(gemini.named_tensors(model)), before)


def test_a_checkpoint_with_an_average_that_was_not_made_before_loading_warns(tmp_path: Path) -> None:
    booster, model, optimizer = boost("home", tmp_path)
    gemini.EMA(model, DECAY, name="slow")
    gemini.SWA(model)
    train(booster, model, optimizer, range(1))
    booster.save(tmp_path / "run", model=model, optimizer=optimizer)
    booster.save(tmp_path / "named", model={"a": model}, optimizer={"a": optimizer})
    other_booster, other, other_optimizer = boost("home", tmp_path)
    gemini.SWA(other)
    with pytest.warns(UserWarning, match=r"the running averages slow, .* make it before: gemini\.EMA\(model"):
        other_booster.load(tmp_path / "run", model=other, optimizer=other_optimizer)
    with pytest.warns(UserWarning, match="the running averages slow,"):
        other_booster.load(tmp_path / "named", model={"a": other}, optimizer={"a": other_optimizer})
    gemini.EMA(other, DECAY, name="slow")
    other_booster.load(tmp_path / "run", model=other, optimizer=other_optimizer)
    plain = made()
    booster.load(tmp_path / "run", model=plain)  # cannot have one


@pytest.mark.parametrize("form", FORMS)
def test_one_kind_of_average_is_not_loaded_into_another(form: str, tmp_path: Path) -> None:
    booster, model, optimizer = boost("home", tmp_path)
    FORMS[form][0](model)
    train(booster, model, optimizer, range(2))
    booster.save(tmp_path / "run", model=model, optimizer=optimizer)
    with safe_open(tmp_path / "run" / "latest" / f"{form}.safetensors", "pt") as file:
        assert file.metadata()["gemini_memory.average"] == form.upper()
        assert file.metadata().get("gemini_memory.average.decay") == (str(DECAY) if form == "ema" else None)
    other_booster, other, other_optimizer = boost("home", tmp_path)
    average = gemini.SWA(other, name="ema") if form == "ema" else gemini.EMA(other, name="swa")
    before = dict(gemini.named_tensors(other))
    way_out = r"EMA\(model, decay=0.9, name='ema'\)" if form == "ema" else r"SWA\(model, name='swa'\)"
    with pytest.raises(CheckpointError, match=rf"holds an average of the kind {form.upper()}.*gemini\.{way_out}"):
        other_booster.load(tmp_path / "run", model=other, optimizer=other_optimizer)
    assert average.n_averaged == 0
    assert_same(dict(gemini.named_tensors(other)), before)


NO_STATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no count": ({"n_averaged": None}, TypeError, "n_averaged must be an integer"),
    "two counts": ({"n_averaged": torch.tensor([1, 2])}, TypeError, "n_averaged must be an integer"),
    "a negative count": ({"n_averaged": -5}, ValueError, "n_averaged counts steps and is 0 or more, got -5"),
    "half a step": ({"n_averaged": torch.tensor(1.5)}, TypeError, "n_averaged must be an integer"),
    "a truth value": ({"n_averaged": torch.tensor(True)}, TypeError, "n_averaged must be an integer"),
    "complex": ({"module.wide": torch.ones(5, dtype=torch.complex64)}, ValueError, "module.wide is of torch.complex64"),
    "complex, in a chunk": (
        {"module.first.bias": torch.ones(48) * 1j},
        ValueError,
        r"first.bias is of torch.complex64",
    ),
    "another shape": (
        {"module.first.bias": torch.ones(1)},
        ValueError,
        r"first.bias has the shape \(1,\), expected \(48",
    ),
    "sparse": ({"module.first.bias": torch.ones(48).to_sparse()}, ValueError, "first.bias has the layout"),
    "meta": ({"module.first.bias": torch.ones(48, device="meta")}, ValueError, "first.bias has no values"),
    "a list": ({"module.first.bias": [1.0] * 48}, TypeError, "first.bias must be a tensor, got a list"),
    "an unknown name": ({"module.second.bias": torch.ones(48)}, ValueError, "unexpected: module.second.bias"),
    "a name that is none": ({7: torch.ones(48)}, ValueError, "unexpected: 7"),
}


def test_a_state_dict_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    booster, model, optimizer = boost("copied", tmp_path)
    average = gemini.EMA(model, DECAY)
    train(booster, model, optimizer, range(2))
    state, before = average.state_dict(), values(average)
    others = {name: value + 1 for name, value in state.items()}
    for changes, kind, message in NO_STATES.values():
        with pytest.raises(kind, match=message):
            average.load_state_dict({**others, **changes})
    for missing in ("module.first.weight", "module.wide", "n_averaged"):
        with pytest.raises(ValueError, match=f"missing: {missing}"):
            average.load_state_dict({name: value for name, value in others.items() if name != missing})
    for no_dict in ([*others.items()], None, model):
        with pytest.raises(TypeError, match="expected the state dict of an average, got a"):
            average.load_state_dict(no_dict)  # type: ignore[arg-type]
    assert average.n_averaged == 2
    assert_same(values(average), before)
    average.load_state_dict({**others, "n_averaged": 0})
    assert average.n_averaged == 0
    assert_same(values(average), {n: others[f"module.{n}"] if "frozen" not in n else v for n, v in before.items()})


def test_nothing_is_loaded_while_the_parameters_have_the_averages_values(tmp_path: Path) -> None:
    booster, model, optimizer = boost("home", tmp_path)
    average = gemini.EMA(model, DECAY)
    train(booster, model, optimizer, range(2))
    booster.save(tmp_path / "run", model=model, optimizer=optimizer)
    booster.save_model(model, str(tmp_path / "model.safetensors"))
    booster.save_optimizer(optimizer, str(tmp_path / "optimizer"))
    weights, states, of_average = model.state_dict(), optimizer.state_dict(), average.state_dict()
    train(booster, model, optimizer, range(2, 4))
    before, averaged, moments = dict(gemini.named_tensors(model)), values(average), optimizer.state_dict()["state"]
    loads: dict[str, Callable[[], object]] = {
        "booster.load": lambda: booster.load(tmp_path / "run", model=model, optimizer=optimizer),
        "booster.load of the optimizer": lambda: booster.load(tmp_path / "run", optimizer=optimizer),
        "load_model": lambda: booster.load_model(model, str(tmp_path / "model.safetensors")),
        "load_model of a model around it": lambda: booster.load_model(
            nn.Sequential(model), str(tmp_path / "model.safetensors"), strict=False
        ),
        "load_optimizer": lambda: booster.load_optimizer(optimizer, str(tmp_path / "optimizer")),
        "model.load_state_dict": lambda: model.load_state_dict(weights),
        "optimizer.load_state_dict": lambda: optimizer.load_state_dict(states),
        "average.load_state_dict": lambda: average.load_state_dict(of_average),
        "average.write": lambda: average.write(model.first.weight, torch.zeros(48, 16)),
        "another average": lambda: gemini.SWA(model),
    }
    with average.swapped_in():
        for what, load in loads.items():
            with pytest.raises(
                RuntimeError, match=r"have the values of their average: leave ema\.swapped_in\(\) first"
            ):
                load()
                pytest.fail(f"{what} was not refused")
    assert_same(dict(gemini.named_tensors(model)), before)
    assert_same(values(average), averaged)
    for index, state in optimizer.state_dict()["state"].items():
        assert_same(state, moments[index])
    booster.load(tmp_path / "run", model=model, optimizer=optimizer)
    assert_same(values(average), {name.removeprefix("module."): v for name, v in of_average.items() if v.dim()})


def test_models_that_cannot_have_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"that booster\.boost returned"):
        gemini.EMA(made())
    model, *_ = Booster(plugin=GeminiPlugin(telemetry=False)).boost(made())
    with pytest.raises(ValueError, match="boost the model with one"):
        gemini.SWA(model)
    with pytest.raises(ValueError, match="decay"):
        gemini.EMA(model, 1.5)
    _, model, _ = boost("copied", tmp_path, host_memory="480KiB")
    with pytest.raises(OutOfMemory, match=r"A running average needs .* set host_memory to more"):
        gemini.EMA(model)
    assert not any(chunk.plan.averages for chunk in boosted(model).manager.chunks)


def test_names_that_cannot_be_those_of_files_are_refused(tmp_path: Path) -> None:
    booster, model, optimizer = boost("home", tmp_path)
    for name in ("model", "optimizer", "Model"):
        with pytest.raises(ValueError, match=rf"because {name}\.safetensors is a file of every checkpoint"):
            gemini.EMA(model, name=name)
    for name in (
        "",
        ".",
        "a/b",
        "../ema",
        "a\\b",
        "ema.safetensors",
        "model-00001-of-00002",
        "a b",
        "1",
        "\0",
        "é",
        "e" * 300,
    ):
        with pytest.raises(ValueError, match="cannot be the name of an average, which is part of the name of a file"):
            gemini.SWA(model, name=name)
    for name in ("exp_avg", "master"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be the name of an average: the model has"):
            gemini.EMA(model, name=name)
    with pytest.raises(TypeError, match="must be a str, got None"):
        gemini.EMA(model, name=None)  # type: ignore[arg-type]
    averages = [gemini.EMA(model, name=name) for name in ("step", "Ema_1")]
    train(booster, model, optimizer, range(1))
    booster.save(tmp_path / "run", model=model, optimizer=optimizer)
    booster.load(tmp_path / "run", model=model, optimizer=optimizer)
    assert [average.n_averaged for average in averages] == [1, 1]


def test_torchs_own_over_a_second_model_follows_a_boosted_one(tmp_path: Path) -> None:
    plain = made()
    plain_optimizer, expected = optimizer_of(plain), AveragedModel(plain)
    booster, model, optimizer = boost("copied", tmp_path)
    with pytest.raises(RuntimeError, match=r"gemini\.EMA\(model\)"):
        AveragedModel(model)
    averaged = AveragedModel(deepcopy(plain))
    for step in range(3):
        train(booster, model, optimizer, range(step, step + 1))
        train(None, plain, plain_optimizer, range(step, step + 1))
        averaged.update_parameters(model)
        expected.update_parameters(plain)
    for each in (averaged, expected):
        update_bn([batch(7), batch(8)], each)
    assert_same(averaged.state_dict(), expected.state_dict())
