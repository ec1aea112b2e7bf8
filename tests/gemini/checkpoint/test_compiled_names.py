"""What ``torch.compile`` puts into names is not in files, and is accepted where it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same, boost, gpt2, values
from safetensors.torch import load_file, save_file
from torch import nn

from gemini.checkpoint import named_tensors
from gemini.errors import CheckpointError


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def of_compiled_blocks(seed: int = 0) -> nn.Module:
    model: Any = gpt2(seed)
    for index, block in enumerate(model.transformer.h):
        model.transformer.h[index] = compiled(block)
    return model


def of_all(seed: int = 0) -> nn.Module:
    module: nn.Module = compiled(gpt2(seed))
    return module


class Counting(nn.Linear):
    """Its extra state, and a migration that looks at the version of the class."""

    _version = 2
    count = torch.ones(1)

    def get_extra_state(self) -> torch.Tensor:
        return self.count

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.count = state

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("build", [of_compiled_blocks, of_all])
def test_files_have_the_names_of_the_model_that_is_not_compiled(
    build: Callable[..., nn.Module], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    booster, model, optimizer = boost(build())
    path = booster.save(tmp_path, model=model, optimizer=optimizer)
    plain, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(values(plain), values(gpt2()))
    assert json.loads((path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    booster, other, optimizer = boost(build(1))
    booster.load(tmp_path, model=other, optimizer=optimizer)
    assert_same(dict(named_tensors(other)), dict(named_tensors(model)))
    booster, other, _ = boost(gpt2(1))
    booster.load(tmp_path, model=other)
    assert_same(values(other), values(gpt2()))


def test_names_as_torch_saves_them_load_into_both(tmp_path: Path) -> None:
    given = of_compiled_blocks().state_dict()
    torch.save(given, tmp_path / "weights.bin")
    for build in (gpt2, of_compiled_blocks):
        booster, model, _ = boost(build(1))
        booster.load_model(model, tmp_path / "weights.bin")
        assert_same(dict(named_tensors(model)), dict(named_tensors(gpt2())))
        _, model, _ = boost(build(1))
        assert not any(model.load_state_dict(given))
        assert_same(dict(named_tensors(model)), dict(named_tensors(gpt2())))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
@pytest.mark.parametrize("wraps", [(True, False), (False, True), (True, True)])
def test_modules_that_load_themselves_may_be_compiled(wraps: tuple[bool, bool], name: str, tmp_path: Path) -> None:
    models = []
    for is_compiled in wraps:
        module = Counting(4, 4)
        models.append(boost(nn.Sequential(compiled(module) if is_compiled else module)))
    (booster, model, _), (_, other, _) = models
    next(m for m in model.modules() if isinstance(m, Counting)).count = torch.full((1,), 5.0)
    booster.save_model(model, tmp_path / name)
    booster.load_model(other, tmp_path / name)
    assert_same(dict(named_tensors(other)), dict(named_tensors(model)))
    assert next(m for m in other.modules() if isinstance(m, Counting)).count == 5


def test_a_file_with_both_kinds_of_names_is_no_surprise(tmp_path: Path) -> None:
    save_file({"0._orig_mod.weight": torch.ones(4, 4), "0.bias": torch.ones(4)}, tmp_path / "mixed.safetensors")
    booster, model, _ = boost(nn.Sequential(nn.Linear(4, 4)))
    booster.load_model(model, tmp_path / "mixed.safetensors")
    booster.save_model(model, tmp_path / "own.safetensors")
    assert_same(load_file(tmp_path / "own.safetensors"), {"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)})


def test_a_file_with_two_values_under_one_name_is_refused(tmp_path: Path) -> None:
    twice = {"0._orig_mod.weight": torch.ones(4, 4), "0.weight": torch.zeros(4, 4), "0.bias": torch.ones(4)}
    save_file(twice, tmp_path / "twice.safetensors")
    booster, model, _ = boost(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(CheckpointError, match=r"twice\.safetensors: 0\.weight is stored with and without '_orig_mod"):
        booster.load_model(model, tmp_path / "twice.safetensors")
