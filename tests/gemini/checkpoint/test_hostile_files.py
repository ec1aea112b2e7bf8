"""Damaged and hostile files: a clear error, and the model is as it was."""

import json
import os
import pickle
import random
import struct

import pytest
import torch
from checkpoint_cases import assert_same, boost, mixed, values
from torch import nn

from gemini.checkpoint import load_model, load_optimizer, save_model
from gemini.errors import CheckpointError


def safetensors(header: object, data: bytes = b"\0" * 48, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: object = "F32", shape: object = (3, 4), offsets: object = (0, 48)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "garbage": bytes(random.Random(0).randbytes(500)),
    "no header": struct.pack("<Q", 0),
    "a header of 2**63 bytes": safetensors({}, length=2**63),
    "a header longer than the file": safetensors({"weight": tensor()}, length=1000),
    "not JSON": safetensors(b"{]"),
    "not UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "a list": safetensors([]),
    "deep nesting": safetensors(b"[" * 100_000 + b"]" * 100_000),
    "a name twice": safetensors(b'{"weight": %b, "weight": %b}' % ((json.dumps(tensor()).encode(),) * 2)),
    "no dtype": safetensors({"weight": {"shape": [3, 4], "data_offsets": [0, 48]}}),
    "an unknown dtype": safetensors({"weight": tensor("F31")}),
    "a dtype that is a list": safetensors({"weight": tensor(["F32"])}),
    "a negative size": safetensors({"weight": tensor(shape=[-3, -4])}),
    "a size that is a float": safetensors({"weight": tensor(shape=[3.0, 4])}),
    "a size that is true": safetensors({"weight": tensor(shape=[True, 12])}),
    "a shape that is a number": safetensors({"weight": tensor(shape=12)}),
    "huge sizes": safetensors({"weight": tensor(shape=[2**62, 2**62])}),
    "huge and zero": safetensors({"weight": tensor(shape=[0, 2**62], offsets=[0, 0])}, b""),
    "offsets that do not fit the shape": safetensors({"weight": tensor(offsets=[0, 44])}),
    "offsets backwards": safetensors({"weight": tensor(offsets=[48, 0])}),
    "offsets beyond the end": safetensors({"weight": tensor(offsets=[480, 528])}),
    "three offsets": safetensors({"weight": tensor(offsets=[0, 24, 48])}),
    "overlap": safetensors({"weight": tensor(), "bias": tensor(shape=[4], offsets=[32, 48])}),
    "a hole": safetensors({"weight": tensor(offsets=[16, 64])}, b"\0" * 64),
    "bytes behind the end": safetensors({"weight": tensor()}, b"\0" * 49),
    "cut off": safetensors({"weight": tensor()}, b"\0" * 47),
    "metadata that are numbers": safetensors({"__metadata__": {"a": 1}, "weight": tensor()}),
    "metadata that are a list": safetensors({"__metadata__": [], "weight": tensor()}),
}


def assert_refused(model: nn.Module, checkpoint, *messages: str) -> None:
    before = values(model)
    with pytest.raises(CheckpointError) as caught:
        load_model(model, checkpoint)
    for message in (str(checkpoint), *messages):
        assert message in str(caught.value)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_safetensors_file_is_refused(tmp_path, what: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(BAD[what])
    assert_refused(nn.Linear(4, 3, bias=False), tmp_path / "x.safetensors")


def test_the_file_that_the_damaged_ones_are_made_from_is_accepted(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(safetensors({"weight": tensor()}))
    model = nn.Linear(4, 3, bias=False)
    load_model(model, tmp_path / "x.safetensors")
    assert not model.weight.any()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, suffix: str) -> None:
    save_model(mixed(), tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    _, model, _ = boost(mixed(seed=1))
    cut = tmp_path / f"cut.{suffix}"
    for length in sorted({0, 1, 8, 9, *range(100, len(whole), len(whole) // 12), len(whole) - 1}):
        cut.write_bytes(whole[:length])
        assert_refused(model, cut)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_torch_file_is_not_run(tmp_path, monkeypatch, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, "evil.pt", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"weight": Payload()}))
    for name in ("evil.pt", "evil.bin"):
        assert_refused(nn.Linear(4, 3), tmp_path / name)
        with pytest.raises(CheckpointError):
            load_optimizer(torch.optim.AdamW(nn.Linear(4, 3).parameters()), tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), {1: torch.ones(1)}, {"model": {}, "epoch": 3}])
def test_a_torch_file_without_a_state_dict_says_so(tmp_path, content) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert_refused(nn.Linear(4, 3), tmp_path / "x.pt", "does not hold a state dict")


def test_a_tensor_that_claims_to_be_huge_takes_no_memory(tmp_path) -> None:
    torch.save({"weight": torch.zeros(1).expand(2**40)}, tmp_path / "x.pt")
    assert_refused(nn.Linear(4, 3, bias=False), tmp_path / "x.pt", "stored with shape (1099511627776,)")


def test_a_missing_checkpoint_says_what_was_looked_for(tmp_path) -> None:
    model = mixed()
    assert_refused(model, tmp_path / "nowhere", "no such file or folder")
    (tmp_path / "empty").mkdir()
    assert_refused(model, tmp_path / "empty", "model.safetensors.index.json", "pytorch_model.bin")


def rewrite(index, change) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def test_every_missing_file_of_an_index_is_named(tmp_path) -> None:
    save_model(mixed(), tmp_path, shard=True, size_per_shard="200B")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[0].unlink()
    shards[-1].unlink()
    assert_refused(mixed(seed=1), tmp_path, shards[0].name, shards[-1].name, "do not exist")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.safetensors", "a/../../b.safetensors", 3, None])
def test_an_index_cannot_name_files_elsewhere(tmp_path, path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": path}}))
    assert_refused(nn.Linear(4, 3), tmp_path, "index.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', "\xff", "[" * 100_000])
def test_a_damaged_index_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert_refused(nn.Linear(4, 3), tmp_path, "index.json")


def test_an_index_that_names_tensors_which_are_not_there_is_refused(tmp_path) -> None:
    save_model(mixed(), tmp_path, shard=True, size_per_shard="200B")
    index = tmp_path / "model.safetensors.index.json"
    first = sorted(tmp_path.glob("*.safetensors"))[0].name
    rewrite(index, lambda content: content["weight_map"].update(conjured=first))
    assert_refused(mixed(seed=1), tmp_path, f"conjured (in {first})")
