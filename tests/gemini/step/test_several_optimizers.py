"""Several optimizers of one model, as Muon for matrices and AdamW for the rest: the bits of the same in plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2Config, GPT2LMHeadModel

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

VOCABULARY = 208
PLACES: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"device_memory": "300KiB", "chunk_config_dict": {1: {"chunk_size": 1024}}},
    "disk": {"host_memory": "1MiB", "chunk_config_dict": {1: {"chunk_size": 1024}}},
}


def build() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_head=2, n_layer=3, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def optimizers_of(model: nn.Module, others: Any = torch.optim.AdamW) -> list[Any]:
    matrices = [p for key, p in model.named_parameters() if p.dim() == 2 and ".h." in key]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    decayed = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() < 2]},
    ]
    options = {"fused": True} if others is torch.optim.AdamW else {}
    return [torch.optim.Muon(matrices, lr=1e-2), others(decayed, lr=1e-3, **options)]


class Run:
    """A GPT-2 in plain torch, or boosted, with both optimizers and a scheduler for each."""

    def __init__(self, place: dict[str, Any] | None, others: Any = torch.optim.AdamW, **plugin: Any) -> None:
        self.model: Any = build()
        self.optimizers: Any = optimizers_of(self.model, others)
        self.schedulers = [lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in self.optimizers]
        self.booster: Any = None
        if place is not None:
            options: dict[str, Any] = {"precision": "fp32", "telemetry": False, **place, **plugin}
            self.booster = Booster(plugin=GeminiPlugin(**options))
            self.model, self.optimizers, *_ = self.booster.boost(self.model, self.optimizers)

    def backward(self, number: int, micro_batches: int = 1) -> float:
        loss = torch.zeros(())
        for micro in range(micro_batches):
            generator = torch.Generator().manual_seed(100 * micro + number)
            tokens = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
            loss = self.model(input_ids=tokens, labels=tokens).loss
            if self.booster is not None:
                self.booster.backward(loss, self.optimizers)
            else:
                loss.backward()
        return float(loss.detach())

    def step_each(self) -> None:
        for each in self.optimizers:
            each.step()
            each.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()

    def step_all(self) -> None:
        if self.booster is None:
            self.step_each()
            return
        self.optimizers.step()
        self.optimizers.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()


def check_same(ours: Run, plain: Run) -> None:
    weights = ours.model.state_dict()
    assert not [key for key, value in plain.model.state_dict().items() if not torch.equal(weights[key], value)]
    for mine, theirs in zip(ours.optimizers, plain.optimizers, strict=True):
        check_same_states(mine.state_dict(), theirs.state_dict())


def check_same_states(found: Any, expected: Any) -> None:
    assert found["state"].keys() == expected["state"].keys()
    assert [group["lr"] for group in found["param_groups"]] == [group["lr"] for group in expected["param_groups"]]
    for index, state in expected["state"].items():
        assert {"step", *found["state"][index]} == {"step", *state}
        for name, value in state.items():
            assert torch.equal(found["state"][index][name], value), (index, name)


def placed(place: str, folder: Path) -> dict[str, Any]:
    return {**PLACES[place], **({"offload_dir": folder} if place == "disk" else {})}


@pytest.mark.parametrize("steps", ["each", "all"])
@pytest.mark.parametrize("place", PLACES)
def test_muon_and_adamw_train_as_in_plain_torch(place: str, steps: str, tmp_path: Path) -> None:
    ours, plain = Run(placed(place, tmp_path)), Run(None)
    for number in range(4):
        micro_batches = 2 if number == 2 else 1
        assert ours.backward(number, micro_batches) == plain.backward(number, micro_batches)
        if number % 2:
            norms = [float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)) for run in (ours, plain)]
            assert norms[0] == norms[1]
        ours.step_each() if steps == "each" else ours.step_all()
        plain.step_all()
    check_same(ours, plain)


def trained(place: dict[str, Any] | None, steps: int = 2, **options: Any) -> Run:
    run = Run(place, **options)
    for number in range(steps):
        run.backward(number)
        run.step_all()
    return run


def go_on(ours: Run, plain: Run) -> None:
    for run in (ours, plain):
        run.backward(7)
        run.step_all()
    check_same(ours, plain)


@pytest.mark.parametrize(
    "how", ["joint folder", "joint file", "each folder", "committed", "committed list", "dict", "dcp"]
)
def test_a_checkpoint_of_both_goes_on_as_plain_torch_does(how: str, tmp_path: Path) -> None:
    first, plain = trained(PLACES["streamed"]), trained(None)
    second = Run(PLACES["resident"])
    booster, folder = second.booster, tmp_path / "saved"

    def parts(run: Run) -> Any:
        given = {"committed": run.optimizers, "dcp": run.optimizers, "committed list": list(run.optimizers)}
        return given.get(how) or dict(zip(("muon", "rest"), run.optimizers, strict=True))

    if how in ("committed", "committed list", "dict", "dcp"):
        layout = {"layout": "dcp"} if how == "dcp" else {}
        booster.save(folder, model=first.model, optimizer=parts(first), **layout)
        booster.load(folder, model=second.model, optimizer=parts(second))
    else:
        booster.save_model(first.model, folder)
        booster.load_model(second.model, folder)
        pairs = zip(first.optimizers, second.optimizers, strict=True)
        for index, (mine, other) in enumerate(
            pairs if how == "each folder" else [(first.optimizers, second.optimizers)]
        ):
            path = folder / f"{index}.pt" if how == "joint file" else folder / str(index)
            booster.save_optimizer(mine, path)
            booster.load_optimizer(other, path)
    for scheduler, saved in zip(second.schedulers, plain.schedulers, strict=True):
        scheduler.load_state_dict(saved.state_dict())
    check_same(second, plain)
    go_on(second, plain)


def test_state_dicts_are_those_of_each_and_of_both_together() -> None:
    ours, plain = trained({}), trained(None)
    check_same(ours, plain)
    muon, rest = (each.state_dict() for each in plain.optimizers)
    both = ours.optimizers.state_dict()
    count = len(muon["state"])
    assert all(
        torch.equal(both["state"][i]["momentum_buffer"], muon["state"][i]["momentum_buffer"]) for i in range(count)
    )
    assert torch.equal(both["state"][count]["exp_avg"], rest["state"][0]["exp_avg"])
    assert [group["params"][0] for group in both["param_groups"]][:2] == [0, count]
    fresh = Run({})
    fresh.model.load_state_dict(ours.model.state_dict())
    for mine, theirs in zip(fresh.optimizers, plain.optimizers, strict=True):
        mine.load_state_dict(theirs.state_dict())  # of plain torch
    for scheduler, saved in zip(fresh.schedulers, plain.schedulers, strict=True):
        scheduler.load_state_dict(saved.state_dict())
    go_on(fresh, plain)
    again = Run({})
    again.optimizers.load_state_dict(both)
    check_same_states(again.optimizers.state_dict(), both)
    matrix = ours.optimizers[0].param_groups[0]["params"][0]
    assert ours.optimizers.state[matrix].keys() == ours.optimizers[0].state[matrix].keys() == {"momentum_buffer"}
    assert set(map(id, ours.optimizers.state)) == {id(p) for p in ours.model.parameters()}
    each = [id(parameter) for part in ours.optimizers for parameter in part.state]
    assert len(each) == len(set(each)) == len(list(ours.model.parameters()))


def test_one_of_them_may_step_alone_or_seldom(tmp_path: Path) -> None:
    ours, plain = Run(placed("disk", tmp_path)), Run(None)
    for number in range(4):
        for run in (ours, plain):
            run.backward(number)
            muon, rest = run.optimizers
            muon.step()
            if number % 2:
                rest.step()
                rest.zero_grad()  # its gradients are of two steps
            muon.zero_grad()
    check_same(ours, plain)


def test_two_of_a_kind_and_one_that_begins_with_states(tmp_path: Path) -> None:
    def others(groups: Any, lr: float) -> Any:
        return torch.optim.Adagrad(groups, lr=lr, initial_accumulator_value=0.1)

    ours, plain = trained(placed("disk", tmp_path), others=others), trained(None, others=others)
    check_same(ours, plain)
    models = [nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    pairs = [[torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model] for model in models]
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    models[0], pairs[0], *_ = booster.boost(models[0], pairs[0])
    for _ in range(3):
        for model, optimizers in zip(models, pairs, strict=True):
            loss = model(torch.ones(2, 16)).square().mean()
            booster.backward(loss, optimizers) if optimizers is pairs[0] else loss.backward()
            for each in optimizers:
                each.step()
            model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_hooks_given_optimizers_and_closures_are_those_of_each() -> None:
    model = build()
    given, called = optimizers_of(model), []
    given[0].register_step_pre_hook(lambda *_: called.append("before"))
    given[1].register_step_post_hook(lambda *_: called.append("after"))
    booster = Booster(plugin=GeminiPlugin(precision="bf16", telemetry=False))
    scheduler = lr_scheduler.StepLR(given[1], 1, 0.5)
    model, (muon, rest), _, _, same = booster.boost(model, tuple(given), lr_scheduler=scheduler)
    assert same is scheduler and called == []
    assert given[0].param_groups is muon.param_groups and given[1].param_groups is rest.param_groups

    def closure() -> Any:
        loss = model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss
        booster.backward(loss, [muon, rest])
        return loss.detach()

    assert float(muon.whole.step(closure)) > 0
    scheduler.step()
    assert called == ["before", "after"] and rest.param_groups[0]["lr"] == 5e-4
    given[0].step()
    given[1].step()
    assert called == ["before", "after"] * 2


def test_groups_are_added_to_one_of_them() -> None:
    ours, plain = Run({}), Run(None)
    for run in (ours, plain):
        run.schedulers = []
        frozen = run.model.transformer.h[2].mlp.c_fc.weight
        muon = run.optimizers[0]
        group = muon.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not frozen]
        muon.add_param_group({"params": [frozen], "lr": 3e-3})
        for number in range(2):
            run.backward(number)
            run.step_all()
    check_same(ours, plain)
    with pytest.raises(ValueError, match=r"add_param_group of the one"):
        ours.optimizers.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="assign to param_groups of one of them"):
        ours.optimizers.param_groups = [{"params": []}]


@pytest.mark.parametrize(
    ("plugin", "why"),
    [
        ({"precision": "fp16"}, "precision='fp16'"),
        ({"max_norm": 1.0}, "max_norm"),
        ({"update_in_backward": True}, "update_in_backward=True"),
    ],
)
def test_a_step_of_one_is_refused_where_it_would_count_for_all(plugin: dict[str, Any], why: str) -> None:
    run = Run({}, **plugin)
    run.backward(0)
    with pytest.raises(ValueError, match=why):
        run.optimizers[0].step()
    run.step_all()
    run.backward(1)
    run.step_all()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_what_cannot_be_given_together() -> None:
    booster, model = Booster(plugin=GeminiPlugin(telemetry=False)), nn.Linear(4, 4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) is in two of the optimizers \(0 and 1\)"):
        booster.boost(model, [sgd, torch.optim.AdamW(model.parameters())])
    with pytest.raises(ValueError, match="none of the 1 parameters"):
        booster.boost(model, [sgd, torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)])
    with pytest.raises(TypeError, match="give several as a list"):
        booster.boost(model, sgd, torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match="as a list of them"):
        booster.boost(model, {"a": sgd})
    model, sgd, *_ = booster.boost(model, sgd)
    assert not torch.equal(model.weight, torch.zeros(4, 4))


def test_an_average_follows_the_steps_of_all() -> None:
    run, plain = Run({}), Run(None)
    average = gemini.EMA(run.model, 0.5)
    reference = AveragedModel(plain.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for number in range(2):
        run.backward(number)
        with pytest.raises(ValueError, match="a running average follows the steps of all"):
            run.optimizers[1].step()
        run.step_all()
        plain.backward(number)
        plain.step_all()
        reference.update_parameters(plain.model)
    check_same(run, plain)
    with average.swapped_in():
        found, expected = run.model.state_dict(), reference.module.state_dict()
    assert not [key for key, value in expected.items() if not torch.equal(found[key], value)]


def test_where_boost_fails_each_keeps_its_state_and_trains_on() -> None:
    run, plain = trained(None), trained(None)
    with pytest.raises(torch.OutOfMemoryError):
        Booster(plugin=GeminiPlugin(telemetry=False, host_memory=1000)).boost(run.model, run.optimizers)
    go_on(run, plain)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, about transformers
def test_adapters_train_under_two_optimizers() -> None:
    def adapted(place: Any) -> Any:
        model = booster.enable_lora(
            build(), lora_config=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        )
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        first, second = ([p for name, p in trained.items() if f"lora_{part}" in name] for part in "AB")
        optimizers: Any = [torch.optim.Muon(first, lr=1e-2), torch.optim.AdamW(second, lr=1e-2, fused=True)]
        if place is not None:
            model, optimizers, *_ = booster.boost(model, optimizers)
        for number in range(2):
            tokens = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(number))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
        return model.state_dict()

    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False, **PLACES["streamed"]))
    found, expected = adapted(PLACES["streamed"]), adapted(None)
    assert not [key for key, value in expected.items() if not torch.equal(found[key], value)]
