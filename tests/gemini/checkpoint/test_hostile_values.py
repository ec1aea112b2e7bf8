"""Files that are whole and hold values that make no sense: refused before anything changes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_cases import INF, NAN, Change, Small, resave, rewrite
from state_uses import same

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.checkpoint import (
    load_lr_scheduler,
    load_model,
    load_optimizer,
    save_lr_scheduler,
    save_model,
    save_optimizer,
)
from gemini.errors import CheckpointError
from gemini.formats import torch_zip
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.rules.option_ranges import group_faults

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_FINITE = (NAN, INF, None, [0.1], "x", {}, 10**400)
NO_NUMBERS = (*NOT_FINITE, -1.0)
PAIRS = ([0.9], 2.0, NAN, "ab", [0.9, 0.99, 0.999], [0.9, 1.0], [NAN, 0.9], [None, 0.9], [True, 0.9], None)
RULES = {
    "Adam": {"lr": NOT_FINITE, "eps": NO_NUMBERS, "weight_decay": NOT_FINITE, "betas": PAIRS, "amsgrad": (None, "x")},
    "SGD": {"momentum": NO_NUMBERS, "dampening": (NAN, INF, None, "x"), "nesterov": (None, 2), "maximize": ("x",)},
    "Adagrad": {"lr_decay": NO_NUMBERS, "eps": NO_NUMBERS, "initial_accumulator_value": NO_NUMBERS},
    "RMSprop": {"alpha": NO_NUMBERS, "eps": NO_NUMBERS, "momentum": NO_NUMBERS, "centered": (None, 0.5)},
    "Adadelta": {"rho": (*NO_NUMBERS, 1.5), "eps": NO_NUMBERS},
    "Adamax": {"betas": PAIRS, "eps": NO_NUMBERS},
    "RAdam": {"betas": PAIRS, "decoupled_weight_decay": (None, "x"), "foreach": ("x", 3)},
    "Rprop": {"etas": ([1.2, 0.5], [0.0, 1.2], [0.5]), "step_sizes": ([-1.0, 50], [1e-6, INF], 3)},
}


@pytest.mark.parametrize("name", RULES)
def test_options_out_of_the_ranges_of_a_constructor_are_named(name: str) -> None:
    cls = getattr(torch.optim, name)
    group = cls([torch.nn.Parameter(torch.ones(2))]).param_groups[0]
    assert not group_faults(name, group, group)
    for option, values in RULES[name].items():
        for value in values:
            (fault,) = group_faults(name, group, {**group, option: value})
            assert fault.startswith((f"{option} must be", f"{option} at index")), fault
            assert len(fault) < 200


def test_options_of_all_kinds_that_constructors_take_have_no_fault() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    tensor = torch.tensor(0.1)
    for name, cls, options in (
        ("Adam", torch.optim.AdamW, {"lr": tensor, "amsgrad": True, "capturable": True, "fused": None}),
        ("Adam", torch.optim.Adam, {"betas": [0.0, 0.999], "eps": 0, "maximize": True, "foreach": True}),
        ("SGD", torch.optim.SGD, {"lr": tensor, "momentum": 0.9, "nesterov": True, "fused": True}),
        ("SGD", torch.optim.SGD, {"dampening": -0.5, "weight_decay": torch.tensor(0.1)}),
        ("Adadelta", torch.optim.Adadelta, {"rho": 1, "capturable": True}),
        ("RMSprop", torch.optim.RMSprop, {"alpha": 1.5, "centered": True}),
    ):
        group = cls([parameter], **options).param_groups[0]
        notes = {"schedule": {"warm": 3}, "clip": INF, "initial_lr": 0.1, "swa": None}
        assert not group_faults(name, group, {**group, **notes}), name


def test_options_of_registered_optimizers_are_of_the_kind_that_they_were() -> None:
    present = {"lr": 0.1, "betas": (0.9, 0.99), "cautious": False, "scheme": "a"}
    wrong = {"lr": NAN, "betas": (0.9,), "cautious": 0.5, "scheme": 3}
    assert len(group_faults("Lion", present, wrong)) == 4
    assert not group_faults("Lion", present, {"lr": 0.2, "betas": [0.5, -2], "cautious": True, "scheme": "b"})


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.AdamW])
def test_options_that_an_optimizer_trains_with_are_loaded_again(cls: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = cls(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / 4)
    booster, model, optimizer, scheduler = boost_scheduled(model, optimizer, scheduler)
    if cls is not torch.optim.RMSprop:  # which refuses it in a step
        optimizer.param_groups[0]["weight_decay"] = True
    for _ in range(5):
        booster.backward(model(torch.ones(2, 4)).square().mean(), optimizer)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
    booster.save(tmp_path, **parts)
    booster.save_optimizer(optimizer, tmp_path / "one")
    (rate,) = scheduler.get_last_lr()
    assert rate < 0
    decay = optimizer.param_groups[0]["weight_decay"]
    for load in (lambda: booster.load(tmp_path, **parts), lambda: booster.load_optimizer(optimizer, tmp_path / "one")):
        optimizer.param_groups[0].update(lr=1.0, weight_decay=0)
        load()
        assert optimizer.param_groups[0]["lr"] == rate
        assert optimizer.param_groups[0]["weight_decay"] == decay
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(("name", "value"), [("lr", NAN), ("lr", INF), ("eps", -1.0), ("betas", (1.0, 0.9))])
def test_options_that_would_not_load_are_not_saved(name: str, value: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    booster, model, optimizer, _ = boost_scheduled(model, torch.optim.AdamW(model.parameters()), None)
    optimizer.param_groups[0][name] = value
    for save in (
        lambda: booster.save(tmp_path, model=model, optimizer=optimizer),
        lambda: booster.save_optimizer(optimizer, tmp_path),
        lambda: booster.save_optimizer(optimizer, tmp_path / "optimizer.pt"),
    ):
        with pytest.raises(CheckpointError, match=f"group 0: {name} .*Nothing was written"):
            save()
    assert not list(tmp_path.iterdir())


def boost_scheduled(model: Any, optimizer: Any, scheduler: Any) -> tuple[Any, ...]:
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    return booster, model, optimizer, scheduler


# -- optimizer.json

GROUP: dict[str, Change] = {
    "lr NaN": lambda j: j["param_groups"][0].update(lr=NAN),
    "betas of one": lambda j: j["param_groups"][0].update(betas=[0.9]),
    "steps of the last NaN": lambda j: j["steps"].update({"3": NAN}),
    "steps infinite": lambda j: j["steps"].update({"3": INF}),
    "steps negative": lambda j: j["steps"].update({"3": -5}),
    "steps of 2**53": lambda j: j["steps"].update({"3": 2**53}),
    "steps a text": lambda j: j["steps"].update({"3": "3"}),
    "steps a flag": lambda j: j["steps"].update({"3": True}),
    "steps half": lambda j: j["steps"].update({"3": 2.5}),
    "steps of nobody": lambda j: j["steps"].update({"9": 3}),
    "steps of 03": lambda j: j["steps"].update({"03": 3}),
    "steps a list": lambda j: j.update(steps=[1, 2]),
    "steps missing of one": lambda j: j["steps"].pop("3"),
    "no weights": lambda j: j.update(weight_map={}),
    "one weight less": lambda j: j["weight_map"].pop("3.exp_avg"),
    "one parameter's weights less": lambda j: [j["weight_map"].pop("3.exp_avg"), j["weight_map"].pop("3.exp_avg_sq")],
    "a weight of nobody": lambda j: j["weight_map"].update({"9.exp_avg": j["weight_map"].pop("3.exp_avg")}),
    "a weight without a number": lambda j: j["weight_map"].update(exp_avg=j["weight_map"].pop("3.exp_avg")),
    "weights elsewhere": lambda j: j["weight_map"].update({"3.exp_avg": "../optimizer.safetensors"}),
    "weights in a device": lambda j: j["weight_map"].update({"3.exp_avg": "/dev/zero"}),
    "weights in a JSON": lambda j: j["weight_map"].update({"3.exp_avg": "optimizer.json"}),
    "weights in the folder": lambda j: j["weight_map"].update({"3.exp_avg": "."}),
    "params all -1": lambda j: j["param_groups"][0].update(params=[-1] * 4),
    "params twice": lambda j: j["param_groups"][0].update(params=[0, 1, 2, 2]),
    "params out of range": lambda j: j["param_groups"][0].update(params=[0, 1, 2, 4]),
    "params that are flags": lambda j: j["param_groups"][0].update(params=[False, True, 2, 3]),
    "params that are texts": lambda j: j["param_groups"][0].update(params=["0", "1", "2", "3"]),
    "params a number": lambda j: j["param_groups"][0].update(params=4),
    "names too few": lambda j: j["param_groups"][0]["param_names"].pop(),
    "names twice": lambda j: j["param_groups"][0].update(param_names=["0.weight"] * 4),
    "names that are numbers": lambda j: j["param_groups"][0].update(param_names=[1, 2, 3, 4]),
    "groups twice": lambda j: j["param_groups"].append(j["param_groups"][0]),
    "another group": lambda j: j["param_groups"].append({**j["param_groups"][0], "params": [], "param_names": []}),
    "groups a dict": lambda j: j.update(param_groups={"0": j["param_groups"][0]}),
    "version true": lambda j: j.update(version=True),
    "optimizer null": lambda j: j.update(optimizer=None),
    "a scaler of nonsense": lambda j: j.update(loss_scaler={"scale": "x"}),
    "no scaler key": lambda j: j.pop("loss_scaler"),
    "an option nested deep": lambda j: j["param_groups"][0].update(lr=json.loads("[" * 90 + "]" * 90)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an Adam, and the same as a file."""
    folder = tmp_path_factory.mktemp("saved")
    run = Small(HybridAdam, seed=1)
    run.booster.save_optimizer(run.optimizer, folder)
    run.booster.save_optimizer(run.optimizer, folder / "optimizer.pt")
    return folder


@pytest.fixture(scope="module")
def run() -> Small:
    """Nothing changes it."""
    return Small(HybridAdam, steps=2)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of what was saved, to be changed."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("what", GROUP)
def test_an_optimizer_json_that_makes_no_sense_is_refused(what: str, run: Small, folder: Path) -> None:
    rewrite(folder / "optimizer.json", GROUP[what])
    with run.refuses(folder / "optimizer.json"):
        run.booster.load_optimizer(run.optimizer, folder)
    plain = torch.optim.AdamW(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)).parameters())
    before = plain.state_dict()
    if not what.startswith("names"):
        with pytest.raises(CheckpointError, match=r"optimizer\.json"):
            load_optimizer(plain, folder)
        assert same(plain.state_dict(), before)


def test_an_optimizer_json_with_a_name_twice_is_refused(run: Small, folder: Path) -> None:
    path = folder / "optimizer.json"
    path.write_text(path.read_text().replace('"steps":', '"steps": {}, "steps":'))
    with run.refuses(path, "the name 'steps' appears twice"):
        run.booster.load_optimizer(run.optimizer, folder)


def test_a_changed_digit_in_an_optimizer_json_is_noticed_unless_the_checksum_is_taken_out(folder: Path) -> None:
    path, run = folder / "optimizer.json", Small(HybridAdam)
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.3'))
    with run.refuses(path, "its checksum is another one. If you have edited it, take the entry 'crc32' out"):
        run.booster.load_optimizer(run.optimizer, folder)
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "crc32"})
    )
    run.booster.load_optimizer(run.optimizer, folder)
    assert run.optimizer.param_groups[0]["lr"] == 0.3


# -- files of torch.save


def last(key: str, value: Any) -> Change:
    """Sets an entry of the last parameter's state, so that what is checked while it is loaded is found too late."""
    return lambda saved: saved["state"][3].update({key: value(saved["state"][3][key]) if callable(value) else value})


VALUES: dict[str, Change] = {
    "sparse": last("exp_avg", lambda v: v.to_sparse()),
    "sparse rows": last("exp_avg", lambda v: v.reshape(1, 2).to_sparse_csr()),
    "meta": last("exp_avg", lambda v: v.to("meta")),
    "quantised": last("exp_avg_sq", lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.quint8)),
    "nested": last("exp_avg", lambda v: torch.nested.nested_tensor([v, v])),
    "complex": last("exp_avg", lambda v: v + 1j),
    "flags": last("exp_avg", lambda v: v > 0),
    "whole numbers": last("exp_avg", lambda v: v.int()),
    "another shape": last("exp_avg", lambda v: torch.zeros(3)),
    "a huge shape in 4 bytes": last("exp_avg", torch.zeros(1).expand(2**40)),
    "a number": last("exp_avg", 3.0),
    "a list": last("exp_avg", [0.0, 0.0]),
    "a sparse master": last("master", lambda v: torch.zeros(2).to_sparse()),
    "a step of NaN": last("step", torch.tensor(NAN)),
    "a step of two": last("step", torch.ones(2)),
    "a complex step": last("step", torch.tensor(1j)),
    "a step that is text": last("step", "3"),
    "a step on meta": last("step", torch.ones((), device="meta")),
    "a step of 2**60": last("step", 2.0**60),
    "no step": lambda saved: saved["state"][3].pop("step"),
    "a note that is sparse": last("note", lambda v: torch.zeros(2).to_sparse()),
    "a note of 4 TiB in 4 bytes": last("note", torch.zeros(1).expand(2**40)),
    "a state that is a list": lambda saved: saved["state"].update({3: [1, 2]}),
    "a state of a text": lambda saved: saved["state"].update(x={}),
    "a state of nobody": lambda saved: saved["state"].update({9: saved["state"][3]}),
    "no states": lambda saved: saved.pop("state"),
    "a scaler without numbers": lambda saved: saved.update(loss_scaler={}),
    "lr NaN": lambda saved: saved["param_groups"][0].update(lr=NAN),
    "a complex lr": lambda saved: saved["param_groups"][0].update(lr=torch.tensor(1j)),
    "an lr of two": lambda saved: saved["param_groups"][0].update(lr=torch.ones(2)),
    "a sparse lr": lambda saved: saved["param_groups"][0].update(lr=torch.ones(1).to_sparse()),
    "a number as a name": lambda saved: saved["param_groups"][0].update({3: 4}),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|quantize|TypedStorage).*:UserWarning")
@pytest.mark.parametrize("what", VALUES)
def test_a_state_that_cannot_be_kept_is_refused_by_every_way_to_load(what: str, run: Small, folder: Path) -> None:
    path = folder / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    for state in content["state"].values():
        state.setdefault("master", None)
        state.setdefault("note", None)
    VALUES[what](content)
    torch.save(content, path)
    with run.refuses(path):
        run.booster.load_optimizer(run.optimizer, path)
    plain = torch.optim.AdamW(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)).parameters())
    before = plain.state_dict()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        load_optimizer(plain, path)
    assert same(plain.state_dict(), before)
    if not what.startswith(("a state", "no state", "a scaler", "a number as", "a note of")):
        with run.refuses("", error=ValueError):
            run.optimizer.load_state_dict(content)


def test_states_in_forms_that_hold_all_values_are_loaded(folder: Path) -> None:
    path = folder / "optimizer.pt"
    expected = torch.load(path, weights_only=True)["state"]

    def odd(saved: Any) -> None:
        saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].t().contiguous().t()
        saved["state"][1]["exp_avg"] = saved["state"][1]["exp_avg"].double()
        saved["state"][2]["exp_avg"] = torch.complex(torch.zeros(2, 4), -saved["state"][2]["exp_avg"]).conj().imag
        saved["state"][3]["step"] = 1
        saved["state"][3]["note"] = {"a": 1}
        saved["param_groups"][0].update(lr=torch.tensor(0.1), betas=[0.9, 0.999], capturable=True, schedule={"warm": 3})

    resave(path, odd)
    run = Small(HybridAdam)
    run.booster.load_optimizer(run.optimizer, path)
    found = run.optimizer.state_dict()["state"]
    assert all(torch.equal(found[i][name], expected[i][name]) for i in expected for name in expected[i])
    assert found[3]["note"] == {"a": 1}


def test_a_second_moment_below_0_is_refused_where_its_sign_belongs_to_a_master(tmp_path: Path) -> None:
    from loop import Trained

    run = Trained({}, precision="bf16", split_master=True)
    run.step(0)
    save_optimizer(run.optimizer, tmp_path / "optimizer.pt")
    resave(tmp_path / "optimizer.pt", lambda saved: saved["state"][11]["exp_avg_sq"].neg_())
    before = run.optimizer.state_dict()
    with pytest.raises(CheckpointError, match="exp_avg_sq cannot be negative with split_master=True"):
        run.booster.load_optimizer(run.optimizer, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="exp_avg_sq cannot be negative with split_master=True"):
        run.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert same(run.optimizer.state_dict(), before)


SCALERS: dict[str, Any] = {
    "a number": 3,
    "nothing": {},
    "a NaN": {"scale": NAN},
    "a text": {"growth_factor": "2"},
    "a flag": {"hysteresis": True},
    "a fraction": {"growth_interval": 2.5},
    "shrinking": {"growth_factor": 0.5},
    "negative counts": {"good_steps": -1},
    "something unknown": {"colour": 1},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("what", SCALERS)
def test_a_loss_scaler_that_makes_no_sense_is_refused(what: str, tmp_path: Path) -> None:
    run = Small(HybridAdam, precision="fp16")
    run.booster.save_optimizer(run.optimizer, tmp_path)

    def change(content: Any) -> None:
        wrong = SCALERS[what]
        content["loss_scaler"] = {**content["loss_scaler"], **wrong} if wrong and what != "a number" else wrong

    rewrite(tmp_path / "optimizer.json", change)
    run.step()
    with run.refuses(tmp_path / "optimizer.json", "loss scaler" if what != "a NaN" else "scale"):
        run.booster.load_optimizer(run.optimizer, tmp_path)


# -- schedulers


def schedulers(optimizer: Any) -> dict[str, Any]:
    s = torch.optim.lr_scheduler
    from gemini.nn.lr_scheduler import CosineAnnealingWarmupLR

    return {
        "LambdaLR": s.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        "MultiplicativeLR": s.MultiplicativeLR(optimizer, lambda epoch: 0.9),
        "StepLR": s.StepLR(optimizer, 3),
        "MultiStepLR": s.MultiStepLR(optimizer, [3, 5, 5]),
        "LinearLR": s.LinearLR(optimizer),
        "ExponentialLR": s.ExponentialLR(optimizer, 0.9),
        "CosineAnnealingLR": s.CosineAnnealingLR(optimizer, 10),
        "WarmRestarts": s.CosineAnnealingWarmRestarts(optimizer, 4),
        "ReduceLROnPlateau": s.ReduceLROnPlateau(optimizer),
        "CyclicLR": s.CyclicLR(optimizer, 0.1, 0.2),
        "OneCycleLR": s.OneCycleLR(optimizer, 0.1, total_steps=20),
        "SequentialLR": s.SequentialLR(optimizer, [s.ConstantLR(optimizer), s.ExponentialLR(optimizer, 0.9)], [3]),
        "ChainedScheduler": s.ChainedScheduler([s.ConstantLR(optimizer), s.ExponentialLR(optimizer, 0.9)]),
        "ours": CosineAnnealingWarmupLR(optimizer, 10, 3),
    }


NAMES = list(schedulers(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)))


def scheduler(name: str) -> Any:
    return schedulers(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9))[name]


def attributes(each: Any) -> Any:
    return dict(vars(each)), [attributes(inner) for inner in getattr(each, "_schedulers", ())]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step()`:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_of_each_kind_is_loaded_and_one_with_other_values_is_not(name: str, tmp_path: Path) -> None:
    path, stepped = tmp_path / "lr_scheduler.pt", scheduler(name)
    for _ in range(2):
        stepped.optimizer.step() if hasattr(stepped, "optimizer") else None
        stepped.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    save_lr_scheduler(stepped, path)
    state = torch.load(path, weights_only=True)
    fresh = scheduler(name)
    load_lr_scheduler(fresh, path)
    assert same(fresh.state_dict(), stepped.state_dict())
    older = {key: value for key, value in state.items() if key not in ("_is_initial", "_get_lr_called_within_step")}
    torch.save({**older, "verbose": False}, path)
    load_lr_scheduler(scheduler(name), path)

    wrong: list[Any] = [[], 3, {}, {1: 2}, {"last_epoch": "x"}, {**state, "optimizer": 7}, {**state, "step": 5}]
    wrong += [{**state, key: value} for key, value in (("_last_lr", [NAN]), ("_last_lr", []), ("_last_lr", 0.1))]
    wrong += [{key: value for key, value in state.items() if key != "_last_lr"}, {**state, "load_state_dict": 1}]
    for key, value in state.items():
        if isinstance(value, bool | str):
            wrong.append({**state, key: 2})
        elif isinstance(value, int | float):
            wrong += [{**state, key: None}, {**state, key: NAN}, {**state, key: "x"}, {**state, key: True}]
        elif isinstance(value, list | dict) and key != "lr_lambdas":
            wrong += [{**state, key: 3}, {**state, key: None}]
    for content in wrong:
        torch.save(content, path)
        before = attributes(fresh)
        with pytest.raises(CheckpointError, match=r"lr_scheduler\.pt is not the state of a ") as caught:
            load_lr_scheduler(fresh, path)
        assert len(str(caught.value)) < 3000
        assert attributes(fresh) == before


def test_a_scheduler_that_fails_in_the_middle_is_as_it_was(tmp_path: Path) -> None:
    each = scheduler("ReduceLROnPlateau")
    torch.save({**each.state_dict(), "mode": "sideways", "patience": 99}, tmp_path / "lr_scheduler.pt")
    before = attributes(each)
    with pytest.raises(CheckpointError, match=r"is not taken by the ReduceLROnPlateau, .*sideways"):
        load_lr_scheduler(each, tmp_path / "lr_scheduler.pt")
    assert attributes(each) == before


# -- weights

WEIGHTS: dict[str, Any] = {
    "sparse": lambda v: v.to_sparse(),
    "meta": lambda v: v.to("meta"),
    "quantised": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.quint8),
    "nested": lambda v: torch.nested.nested_tensor([v, v]),
    "complex": lambda v: v + 1j,
    "huge in 4 bytes": lambda v: torch.zeros(1).expand(2**40),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|quantize|TypedStorage).*:UserWarning")
@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_cannot_be_copied_are_refused_before_the_first_is(what: str, run: Small, tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in run.model.state_dict().items()}
    state["1.bias"] = WEIGHTS[what](state["1.bias"])
    with run.refuses("", "1.bias"):
        run.model.load_state_dict(state)
    torch.save(state, tmp_path / "model.bin")
    with run.refuses(tmp_path / "model.bin", "1.bias"):
        run.booster.load_model(run.model, tmp_path / "model.bin")


class Counting(torch.nn.Linear):
    """Has an extra state that it is particular about."""

    count = 0

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]
        if self.count < 0:
            raise ValueError(f"a count of {self.count}")


@pytest.mark.parametrize("extra", [{"count": -1}, {}, 3, None])
def test_an_extra_state_that_its_module_does_not_take_changes_nothing(extra: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Counting(3, 2), Counting(2, 2))
    state = {
        name: value + 1 if isinstance(value, torch.Tensor) else value for name, value in model.state_dict().items()
    }
    torch.save({**state, "0._extra_state": {"count": 7}, "1._extra_state": extra}, tmp_path / "model.bin")
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"1\._extra_state is not taken by its module"):
        load_model(model, tmp_path / "model.bin")
    assert [layer.count for layer in model] == [0, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_experts_are_looked_at_before_they_are_put_together(tmp_path: Path) -> None:
    from checkpoint_cases import mixtral, values

    model = mixtral()
    save_model(model, tmp_path / "model.bin")
    state = torch.load(tmp_path / "model.bin", weights_only=True)
    name = "model.layers.0.mlp.experts.down_proj"
    experts = state.pop(name)
    parts = {f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight": e.clone() for i, e in enumerate(experts)}
    torch.save({**state, **parts}, tmp_path / "model.bin")
    load_model(model, tmp_path / "model.bin")
    before = values(model)
    parts["model.layers.0.block_sparse_moe.experts.10.w2.weight"] = experts[10].to_sparse()
    torch.save({**state, **parts}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=r"experts\.10\.w2\.weight, which has the layout torch\.sparse_coo"):
        load_model(model, tmp_path / "model.bin")
    assert same(values(model), before)


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model.safetensors.index.json"])
def test_a_pipe_does_not_stop_a_load(name: str, run: Small, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with run.refuses(tmp_path / name):
        run.booster.load_model(run.model, tmp_path / name)
    with pytest.raises(CheckpointError, match="is not a file"):
        load_lr_scheduler(scheduler("StepLR"), tmp_path / name)


def test_what_would_be_too_long_to_load_is_refused_when_it_is_saved(
    run: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_zip, "_PICKLE_BYTES", 30_000)
    long = list(range(20_000))
    each = scheduler("StepLR")
    each.history = long
    with pytest.raises(CheckpointError, match=r"takes \d+ bytes without its tensors.*Make tensors of long lists"):
        save_lr_scheduler(each, tmp_path / "lr_scheduler.pt")
    with pytest.raises(CheckpointError, match=r"extra\.pt would not load again: .* Make tensors of long lists"):
        run.booster.save(tmp_path / "run", model=run.model, extra={"seen": long})
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    run.booster.save(tmp_path / "run", model=run.model, extra={"seen": torch.tensor(long)})


def test_a_value_that_contains_itself_is_refused(run: Small, tmp_path: Path) -> None:
    around: list[Any] = [1]
    around.append(around)
    with pytest.raises(CheckpointError, match="extra contains itself"):
        run.booster.save(tmp_path, model=run.model, extra={"around": around})
    assert not list(tmp_path.glob("checkpoint-*"))
