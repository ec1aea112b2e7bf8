"""Tensors that are larger than a block go between files and their homes in parts, wherever these are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import assert_same
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.checkpoint import blocks, load_model, named_tensors, save_model
from gemini.checkpoint.safetensors_stream import SafetensorsFile
from gemini.nn.optimizer import HybridAdam

PLACES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "split": {"precision": "bf16", "split_master": True},
    "device": {"precision": "bf16", "device_memory": "6MiB"},
    "disk": {"precision": "bf16", "host_memory": "7MiB"},
    "checked disk": {"precision": "bf16", "host_memory": "7MiB", "disk_checksums": True},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "RUN_BYTES", 2 << 20)


class Net(nn.Module):
    """Dense tensors of odd sizes, one of which is in another order in memory, an empty one, and integers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(701, 997)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.second = nn.Linear(997, 301, bias=False)
        self.register_buffer("counts", torch.randint(1 << 40, (7,)))
        self.register_buffer("empty", torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        image = self.conv(x[:, :48].view(-1, 3, 4, 4).contiguous(memory_format=torch.channels_last))
        return self.second(torch.tanh(self.first(x))) + image.mean()


def boost(seed: int, place: str, folder: Path) -> tuple[Booster, Any, Any]:
    offload = {"offload_dir": folder / "offload"} if "disk" in place else {}
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **PLACES[place], **offload))
    model: Any = Net(seed)
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-2))
    booster.backward(model(torch.randn(2, 701)).float().square().mean(), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return booster, model, optimizer


@pytest.mark.one_in(3)
@pytest.mark.parametrize("place", PLACES)
def test_a_file_has_the_values_of_every_place_and_gives_them_back(tmp_path: Path, place: str) -> None:
    booster, model, optimizer = boost(0, place, tmp_path)
    booster.save(tmp_path / "saved", model=model, optimizer=optimizer)
    weights, states = dict(named_tensors(model)), optimizer.state_dict()["state"]
    with SafetensorsFile(next((tmp_path / "saved").glob("*/model.safetensors"))) as file:
        assert_same({name: file.read(name) for name in file.records}, weights)
    booster, model, optimizer = boost(1, place, tmp_path)
    assert not torch.equal(dict(named_tensors(model))["first.weight"], weights["first.weight"])
    booster.load(tmp_path / "saved", model=model, optimizer=optimizer)
    assert_same(dict(named_tensors(model)), weights)
    for index, state in optimizer.state_dict()["state"].items():
        assert_same(state, states[index])
    x = torch.randn(2, 701)
    _, other, _ = boost(2, place, tmp_path)
    other.load_state_dict(weights)
    assert torch.equal(model(x), other(x))  # the full copies follow, too


@pytest.mark.parametrize("place", ["fp32", "bf16", "split", "disk"])
def test_a_file_of_another_dtype_is_converted_in_parts(tmp_path: Path, place: str) -> None:
    low = Net(3).to(torch.bfloat16)
    save_model(low, tmp_path / "low.safetensors")
    _, model, _ = boost(1, place, tmp_path)
    load_model(model, tmp_path / "low.safetensors")
    assert_same(
        dict(named_tensors(model)), {name: v.to(model.state_dict()[name].dtype) for name, v in low.state_dict().items()}
    )


def test_parameters_of_a_plain_model_notice_that_they_were_loaded(tmp_path: Path) -> None:
    save_model(Net(0), tmp_path / "x.safetensors")
    model = Net(1)
    loss = model(torch.randn(2, 701)).square().mean()
    load_model(model, tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
