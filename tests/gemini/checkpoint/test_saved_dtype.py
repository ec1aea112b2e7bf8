"""Weights saved in another dtype, for inference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same, boost, gpt2, mixed, values
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from gemini.checkpoint import load_model, save_model
from gemini.errors import CheckpointError


def rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


@pytest.mark.parametrize("options", [{}, {"shard": True, "size_per_shard": "20KiB"}, {"use_safetensors": False}])
def test_transformers_builds_the_model_in_the_saved_dtype(tmp_path: Path, options: dict[str, Any]) -> None:
    booster, model, _ = boost(gpt2(seed=0), "bf16")
    booster.save_model(model, tmp_path, dtype=torch.bfloat16, **options)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    found = GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto")
    assert found.dtype == torch.bfloat16
    assert_same(found.state_dict(), rounded(model.state_dict(), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_integers_stay_and_masters_are_filled_by_widening(tmp_path: Path, dtype: torch.dtype) -> None:
    _, model, _ = boost(mixed(seed=0), "bf16")
    expected = rounded(values(model), dtype)
    save_model(model, tmp_path / "x.safetensors", dtype=dtype)
    stored = load_file(tmp_path / "x.safetensors")
    assert_same({name: expected[name] for name in stored}, stored)
    _, other, _ = boost(mixed(seed=1), "bf16")
    before = values(other)
    load_model(other, tmp_path / "x.safetensors")
    assert_same(values(other), {name: expected[name].to(before[name].dtype) for name in before})


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        (torch.int8, ValueError, "rounded, not quantised"),
        (torch.complex64, ValueError, r"one of torch\.bfloat16"),
        (torch.float8_e4m3fn, ValueError, r"one of torch\.bfloat16"),
        ("bfloat16", TypeError, "got 'bfloat16'"),
    ],
)
def test_other_dtypes_are_refused(tmp_path: Path, dtype: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        save_model(mixed(), tmp_path / "x", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_values_that_become_infinite_are_refused_by_name(tmp_path: Path, name: str) -> None:
    model = mixed()
    tensor = next(iter(model.named_parameters()))
    with torch.no_grad():
        tensor[1].view(-1)[0] = 70_000
    with pytest.raises(CheckpointError, match=rf"{tensor[0]} has values beyond 65504"):
        save_model(model, tmp_path / name, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_rounded_go_with_no_optimizer(tmp_path: Path) -> None:
    booster, model, _ = boost(mixed(), "bf16")
    booster.save_model(model, tmp_path, dtype=torch.bfloat16)
    assert b"gemini_memory.id" not in (tmp_path / "model.safetensors").read_bytes()
    booster.save_model(model, tmp_path)
    assert b"gemini_memory.id" in (tmp_path / "model.safetensors").read_bytes()
