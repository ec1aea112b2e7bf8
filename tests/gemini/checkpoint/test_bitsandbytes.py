"""Weights that bitsandbytes has quantised load without it, and into the same codes where there are any."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import ABSMAX, FORMATS, MASTER, dequantise, quantise
from gemini.errors import CheckpointError

NF4 = FORMATS["nf4"]


def weight(seed: int = 0, shape: tuple[int, int] = (96, 64)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_bytes(said: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def four_bits(value: Tensor, name: str = "0.weight", block: int = 64, **other: Any) -> dict[str, Any]:
    """As ``QuantState.as_dict(packed=True)`` has it."""
    codes, absmax = quantise(value.flatten(), NF4)
    said = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(value.shape), **other}
    return {
        name: codes.view(-1, 1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": torch.tensor(NF4.levels),
        f"{name}.quant_state.bitsandbytes__nf4": as_bytes(said),
    }


def boosted_model(
    quantize: str | None, tmp_path: Path, stored: dict[str, Tensor], precision: str = "fp32"
) -> tuple[Any, Booster]:
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 2, bias=False))
    booster = Booster(plugin=GeminiPlugin(precision=precision, telemetry=False, quantize=quantize))
    (model, *_) = booster.boost(model)
    save_file({**stored, "2.weight": torch.ones(2, 96)}, tmp_path / "model.safetensors")
    return model, booster


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_four_bits_load_with_their_values(quantize: str | None, tmp_path: Path) -> None:
    stored = four_bits(weight())
    model, booster = boosted_model(quantize, tmp_path, stored)
    booster.load_model(model, str(tmp_path))
    expected = dequantise(*quantise(weight().flatten(), NF4), NF4, torch.float32).view(96, 64)
    assert torch.equal(model.state_dict()["0.weight"], expected)
    if quantize is not None:
        homes = boosted(model).manager.chunks[0].homes
        assert torch.equal(homes[MASTER].tensor[: 96 * 32], stored["0.weight"].flatten())
        assert torch.equal(homes[ABSMAX].tensor[:96], stored["0.weight.absmax"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scales_may_be_quantised_too(precision: str, tmp_path: Path) -> None:
    stored = four_bits(weight(), nested_blocksize=256, nested_dtype="float32", nested_offset=2.5)
    rank = torch.arange(96, dtype=torch.uint8)
    levels = torch.linspace(-1, 1, 256)
    stored |= {
        "0.weight.absmax": rank,
        "0.weight.nested_absmax": torch.tensor([0.5]),
        "0.weight.nested_quant_map": levels,
    }
    model, booster = boosted_model("nf4", tmp_path, stored, precision)
    booster.load_model(model, str(tmp_path))
    absmax = levels[:96] * 0.5 + 2.5
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    expected = dequantise(stored["0.weight"].flatten(), absmax, NF4, dtype).view(96, 64)
    assert torch.equal(model.state_dict()["0.weight"], expected)
    model.load_state_dict(model.state_dict())  # in bf16 the scales could not be told from these values
    assert torch.equal(model.state_dict()["0.weight"], expected)
    assert torch.equal(boosted(model).manager.chunks[0].homes[ABSMAX].tensor[:96], absmax)


def test_eight_bits_with_a_scale_for_each_row_load(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (96, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    stored = {"0.weight": codes, "0.SCB": torch.rand(96) + 1, "0.weight_format": torch.tensor(0, dtype=torch.uint8)}
    model, booster = boosted_model(None, tmp_path, stored)
    booster.load_model(model, str(tmp_path))
    assert torch.equal(model.state_dict()["0.weight"], codes.float() * (stored["0.SCB"].view(-1, 1) / 127))


def test_a_transposed_layer_of_transformers_gets_its_own_layout(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(64, 64)  # square: the shape does not tell
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    model: Any = booster.boost(nn.Sequential(layer))[0]
    save_file({**four_bits(weight(0, (64, 64))), "0.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    booster.load_model(model, str(tmp_path))
    expected = dequantise(*quantise(weight(0, (64, 64)).flatten(), NF4), NF4, torch.float32).view(64, 64)
    assert torch.equal(model.state_dict()["0.weight"], expected.t())


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"0.weight.absmax": torch.ones(7)}, "absmax has 7 values, expected 96"),
        ({"0.weight.quant_map": torch.ones(15)}, "quant_map has 15 values, expected 16"),
        ({"0.weight": torch.ones(96, 32)}, r"its codes are of torch\.float32 with shape \(96, 32\), expected uint8"),
        ({"0.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}, "are no quantised weight"),
        (
            {"0.weight.quant_state.bitsandbytes__nf4": torch.zeros(9)},
            r"its state is of torch\.float32 with shape \(9,\)",
        ),
        ({"0.weight.quant_state.bitsandbytes__nf4": as_bytes({"shape": [96, 64], "blocksize": 0})}, "blocks of 0"),
        ({"0.weight.quant_state.bitsandbytes__nf4": as_bytes({"shape": [1 << 40, 9], "blocksize": 1})}, "absmax"),
        ({"0.weight.quant_state.bitsandbytes__nf4": as_bytes({"shape": "96", "blocksize": 1})}, "are no quantised"),
        ({"0.weight.quant_state.bitsandbytes__nf4": as_bytes([])}, "are no quantised weight"),
        ({"0.weight.nested_absmax": torch.ones(1)}, "are no quantised weight"),
    ],
)
def test_a_broken_group_is_an_error_that_names_it(spoilt: Any, message: str, tmp_path: Path) -> None:
    model, booster = boosted_model("nf4", tmp_path, {**four_bits(weight()), **spoilt})
    before = model.state_dict()["0.weight"]
    with pytest.raises(CheckpointError, match=message) as told:
        booster.load_model(model, str(tmp_path))
    assert str(tmp_path) in str(told.value) and "0.weight.quant_state" in str(told.value)
    assert torch.equal(model.state_dict()["0.weight"], before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_what_bitsandbytes_saves_loads(is_nested: bool, precision: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight(), blocksize=64, quant_type="nf4", compress_statistics=is_nested
    )
    stored = {f"0.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    model, booster = boosted_model("nf4", tmp_path, {"0.weight": codes, **stored}, precision)
    booster.load_model(model, str(tmp_path))
    state.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert torch.equal(model.state_dict()["0.weight"], bitsandbytes.functional.dequantize_4bit(codes, state))
