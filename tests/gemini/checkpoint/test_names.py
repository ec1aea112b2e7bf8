"""What a model holds under which name."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_cases import Mixed, assert_same, boost, gpt2, mixed, train, values
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import gemini
from gemini.checkpoint import load_model, named_tensors, save_model
from gemini.checkpoint.names import entries
from gemini.errors import CheckpointError
from gemini.lazy import LazyInitContext


@pytest.mark.parametrize("build", [gpt2, mixed])
def test_a_boosted_state_dict_is_the_plain_one_bit_for_bit(build) -> None:
    expected = values(build())
    _, model, _ = boost(build())
    found = model.state_dict()
    assert_same(found, expected)
    assert all(found[name].stride() == expected[name].stride() for name in expected)
    assert found._metadata == build().state_dict()._metadata


def test_tied_names_share_one_tensor_in_the_state_dict() -> None:
    _, model, _ = boost(gpt2())
    state = model.state_dict()
    assert state["lm_head.weight"] is state["transformer.wte.weight"]


@pytest.mark.parametrize("boosted", [True, False])
def test_named_tensors_yields_each_tensor_once_in_the_order_of_the_state_dict(boosted: bool) -> None:
    model = gpt2()
    expected = values(model)
    del expected["lm_head.weight"]
    if boosted:
        _, model, _ = boost(model)
    assert_same(dict(named_tensors(model)), expected)


def test_named_tensors_are_copies_of_the_fp32_masters() -> None:
    booster, model, optimizer = boost(gpt2(), "bf16")
    train(booster, model, optimizer, range(1))
    before = dict(named_tensors(model))
    kept = {name: value.clone() for name, value in before.items()}
    assert all(value.dtype == torch.float32 for value in before.values())
    assert any((value != value.bfloat16()).any() for value in before.values())
    train(booster, model, optimizer, range(1, 2))
    assert_same(before, kept)


def test_frozen_parameters_keep_the_dtype_of_their_home() -> None:
    _, model, _ = boost(mixed(), "bf16")
    dtypes = {name: value.dtype for name, value in named_tensors(model)}
    assert dtypes["frozen"] == torch.bfloat16
    assert dtypes["wide"] == torch.float64
    assert dtypes["scale"] == torch.float32
    assert dtypes["norm.num_batches_tracked"] == torch.int64
    assert "scratch" not in dtypes


def test_a_state_dict_can_be_loaded_back() -> None:
    booster, model, optimizer = boost(gpt2(), "bf16")
    state = model.state_dict()
    train(booster, model, optimizer, range(2))
    assert not torch.equal(model.state_dict()["lm_head.weight"], state["lm_head.weight"])
    result = model.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(model.state_dict(), state)


def test_the_next_forward_uses_what_was_loaded() -> None:
    booster, model, optimizer = boost(gpt2(seed=1), "bf16")
    train(booster, model, optimizer, range(1))  # full copies are resident now
    model.load_state_dict(gpt2(seed=0).state_dict())
    other_booster, other, other_optimizer = boost(gpt2(seed=0), "bf16")
    assert train(booster, model, optimizer, range(1)) == train(other_booster, other, other_optimizer, range(1))


def test_one_name_of_a_tie_is_enough() -> None:
    _, model, _ = boost(gpt2(seed=1))
    state = gpt2(seed=0).state_dict()
    first = OrderedDict((name, value) for name, value in state.items() if name != "lm_head.weight")
    last = OrderedDict((name, value) for name, value in state.items() if name != "transformer.wte.weight")
    for part in (first, last):
        model.load_state_dict(gpt2(seed=2).state_dict())
        model.load_state_dict(part)
        assert_same(model.state_dict(), state)


def test_everything_wrong_is_said_at_once_and_nothing_is_changed() -> None:
    _, model, _ = boost(gpt2())
    before = values(model)
    state = gpt2(seed=1).state_dict()
    del state["transformer.ln_f.bias"], state["transformer.h.0.ln_1.weight"]
    state["transformer.wpe.weight"] = torch.zeros(3, 4)
    state["nonsense"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    assert isinstance(caught.value, CheckpointError)
    for part in ("transformer.ln_f.bias", "transformer.h.0.ln_1.weight", "(3, 4)", "(32, 32)", "nonsense"):
        assert part in str(caught.value)
    assert_same(model.state_dict(), before)


def test_loading_without_strict_reports_names_but_refuses_shapes() -> None:
    _, model, _ = boost(gpt2())
    weight = torch.ones(32)
    result = model.load_state_dict({"transformer.ln_f.weight": weight, "nonsense": weight}, strict=False)
    assert "transformer.wpe.weight" in result.missing_keys and result.unexpected_keys == ["nonsense"]
    assert torch.equal(model.state_dict()["transformer.ln_f.weight"], weight)
    with pytest.raises(CheckpointError, match=r"stored with shape \(31,\), the model has \(32,\)"):
        model.load_state_dict({"transformer.ln_f.weight": torch.ones(31)}, strict=False)


def test_files_that_are_loaded_without_strict_report_names(tmp_path: Path) -> None:
    booster, model, _ = boost(gpt2())
    save_file({"transformer.ln_f.weight": torch.ones(32), "nonsense": torch.ones(1)}, tmp_path / "part.safetensors")
    result = booster.load_model(model, tmp_path / "part.safetensors", strict=False)
    assert "transformer.wpe.weight" in result.missing_keys and result.unexpected_keys == ["nonsense"]


def test_of_two_values_of_a_tie_the_last_one_is_loaded_as_from_torch(tmp_path: Path) -> None:
    plain, (booster, model, _) = mixed(), boost(mixed())
    names = next(entry.names for entry in entries(model) if len(entry.names) > 1)
    state = plain.state_dict()
    state.update({name: torch.full_like(state[name], i) for i, name in enumerate(names)})
    plain.load_state_dict(state)
    torch.save(state, tmp_path / "weights.ckpt")
    booster.load_model(model, tmp_path / "weights.ckpt")
    assert_same(values(model), values(plain))


def test_prefix_and_destination_work_as_in_torch() -> None:
    plain, (_, model, _) = mixed(), boost(mixed())
    for arguments in ({"prefix": "a."}, {"prefix": "a.", "destination": OrderedDict(x=torch.ones(1))}):
        expected = plain.state_dict(**{k: v.copy() if k == "destination" else v for k, v in arguments.items()})
        assert_same(model.state_dict(**arguments), expected)


def test_a_boosted_model_inside_a_plain_one_is_read_and_written(tmp_path) -> None:
    _, model, _ = boost(mixed(seed=0))
    outer = nn.Sequential(model, nn.Linear(2, 2))
    expected = nn.Sequential(mixed(seed=0), outer[1])
    assert_same(outer.state_dict(), expected.state_dict())
    assert [name for name, _ in named_tensors(outer)][:2] == ["0.scale", "0.frozen"]
    save_model(nn.Sequential(mixed(seed=1), nn.Linear(2, 2)), tmp_path)
    load_model(outer, tmp_path)
    assert_same(model.state_dict(), values(mixed(seed=1)))


def test_the_prefix_of_an_activation_checkpoint_wrapper_is_not_seen() -> None:
    def build() -> nn.Module:
        model = mixed()
        model.first = checkpoint_wrapper(model.first)
        return model

    expected = values(build())
    assert "first.weight" in expected
    _, model, _ = boost(build())
    assert_same(model.state_dict(), expected)
    model.load_state_dict({name: torch.zeros_like(value) for name, value in expected.items()})
    assert not model.state_dict()["first.weight"].any()


class WithExtraState(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.extra = {"version": 1}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state) -> None:
        self.extra = state


def test_extra_states_are_saved_and_loaded(tmp_path) -> None:
    booster, model, _ = boost(WithExtraState())
    assert model.state_dict()["_extra_state"] == {"version": 1}
    model.load_state_dict({**model.state_dict(), "_extra_state": {"version": 2}})
    assert model.extra == {"version": 2}
    booster.save_model(model, tmp_path / "all.pt")
    model.extra = None
    booster.load_model(model, tmp_path / "all.pt")
    assert model.extra == {"version": 2}
    with pytest.raises(CheckpointError, match="_extra_state are not tensors"):
        booster.save_model(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_lazy_model_is_refused(tmp_path) -> None:
    with LazyInitContext():
        model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"weight has no value yet: booster\.boost"):
        save_model(model, tmp_path / "x")


def test_the_public_name_is_this_function() -> None:
    assert gemini.named_tensors is named_tensors
