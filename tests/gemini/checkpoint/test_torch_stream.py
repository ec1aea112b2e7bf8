"""Files of torch.save that are written one tensor at a time hold what torch.load reads of torch's own."""

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from forms import Subject, is_same, small

from gemini.checkpoint import save_streamed, unread_optimizer_state, unread_state_dict, verify_streamed
from gemini.checkpoint.contents import UnreadTensor
from gemini.checkpoint.safetensors_stream import TensorRecord
from gemini.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
]


def unread(value: torch.Tensor) -> UnreadTensor:
    return UnreadTensor(TensorRecord("name", value.dtype, tuple(value.shape)), lambda: value)


@pytest.mark.parametrize("mmap", [False, True])
def test_values_dtypes_strides_and_sharing_are_those_of_torch_save(tmp_path: Path, mmap: bool) -> None:
    base = torch.arange(12.0).view(3, 4)
    dtypes = {str(dtype): torch.tensor([0.0, 1.0, 3.0]).to(dtype) for dtype in DTYPES}
    value = {
        "dtypes": OrderedDict(dtypes), "unread": {name: unread(each) for name, each in dtypes.items()},
        "base": base, "view": base.t()[1:], "same": base, "empty": torch.empty(0, 3),
        "scalar": unread(torch.tensor(3.5)),
        "nested": [1, ("two", {3: None})], "grad": torch.ones(2, requires_grad=True),
    }  # fmt: skip
    save_streamed(value, tmp_path / "f.pt")
    verify_streamed(tmp_path / "f.pt")
    found = torch.load(tmp_path / "f.pt", weights_only=True, mmap=mmap)
    assert list(found) == list(value)
    for name, each in dtypes.items():
        for kind in ("dtypes", "unread"):
            assert found[kind][name].dtype == each.dtype
            assert found[kind][name].untyped_storage().tolist() == each.untyped_storage().tolist()
    assert torch.equal(found["view"], value["view"]) and found["view"].stride() == value["view"].stride()
    assert len({found[name].untyped_storage().data_ptr() for name in ("base", "view", "same")}) == 1
    assert found["empty"].shape == (0, 3) and found["scalar"].item() == 3.5 and found["grad"].requires_grad
    assert found["nested"] == value["nested"]


def test_what_is_not_a_plain_tensor_goes_through_torch(tmp_path: Path) -> None:
    value = {"sparse": torch.eye(3).to_sparse(), "meta": torch.ones(2, device="meta"), "unread": unread(torch.ones(2))}
    save_streamed(value, tmp_path / "f.pt")
    found = torch.load(tmp_path / "f.pt", weights_only=True)
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3)) and torch.equal(found["unread"], torch.ones(2))


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    for save in (save_streamed, torch.save):
        save({"w": torch.ones(5000)}, tmp_path / "f.pt")
        data = bytearray((tmp_path / "f.pt").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "f.pt").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"f\.pt is damaged"):
            verify_streamed(tmp_path / "f.pt")


def test_what_cannot_be_pickled_leaves_the_old_file(tmp_path: Path) -> None:
    save_streamed({"w": 1}, tmp_path / "f.pt")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_streamed({"w": lambda: None}, tmp_path / "f.pt")
    assert torch.load(tmp_path / "f.pt", weights_only=True) == {"w": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["f.pt"]


def test_states_that_are_read_when_they_are_looked_at_are_the_gathered_ones(tmp_path: Path) -> None:
    subject = Subject(small)
    subject.go_to(2)
    weights, states = unread_state_dict(subject.model), unread_optimizer_state(subject.optimizer)
    expected, optimizer = subject.model.state_dict(), subject.optimizer.state_dict()
    assert is_same(dict(weights.items()), dict(expected)) and is_same(weights["head.bias"], expected["head.bias"])
    del weights["head.bias"]
    weights["more"] = torch.ones(1)
    save_streamed({"weights": weights, "optimizer": states}, tmp_path / "f.pt")
    found = torch.load(tmp_path / "f.pt", weights_only=True)
    assert list(found["weights"]) == [*(name for name in expected if name != "head.bias"), "more"]
    assert is_same(found["optimizer"]["state"], optimizer["state"])
    assert found["optimizer"]["param_groups"] == optimizer["param_groups"]
