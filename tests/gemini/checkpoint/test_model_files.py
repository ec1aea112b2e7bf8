"""Files and folders that save_model writes and load_model reads."""

import json

import pytest
import safetensors.torch
import torch
from checkpoint_cases import assert_same, boost, gpt2, mixed, train, values
from safetensors import safe_open

from gemini.checkpoint import load_model, save_model
from gemini.errors import CheckpointError


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def without_configuration(folder) -> list[str]:
    return [name for name in names(folder) if "config" not in name]


SHAPES = [{}, {"shard": True, "size_per_shard": "10KiB"}, {"use_safetensors": False}]
SHAPES += [{**SHAPES[1], **SHAPES[2]}]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("boosted", [True, False])
@pytest.mark.parametrize("build", [gpt2, mixed])
def test_a_folder_holds_the_model_bit_for_bit(tmp_path, build, boosted: bool, options) -> None:
    model, other = build(seed=0), build(seed=1)
    if boosted:
        _, model, _ = boost(model)
        _, other, _ = boost(other)
    save_model(model, tmp_path / "checkpoint", **options)
    load_model(other, str(tmp_path / "checkpoint"))
    assert_same(other.state_dict(), values(model))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth"])
def test_a_name_with_a_suffix_is_one_file(tmp_path, suffix: str) -> None:
    file = tmp_path / "new" / f"model{suffix}"
    _, model, _ = boost(gpt2(seed=0))
    _, other, _ = boost(gpt2(seed=1))
    save_model(model, file)
    assert names(file.parent) == [file.name]
    load_model(other, file)
    assert_same(other.state_dict(), values(model))


def test_the_safetensors_library_reads_what_we_write(tmp_path) -> None:
    _, model, _ = boost(mixed())
    save_model(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    expected = values(model)
    del expected["second.weight"]  # tied: once
    assert_same({name: found[name] for name in expected}, expected)
    assert len(found) == len(expected)


def test_we_read_what_the_safetensors_library_writes(tmp_path) -> None:
    expected = {name: value.contiguous().clone() for name, value in values(mixed(seed=3)).items()}
    safetensors.torch.save_file(expected, tmp_path / "m.safetensors")
    model = mixed()
    load_model(model, tmp_path / "m.safetensors")
    assert_same(model.state_dict(), expected)


def test_plain_torch_reads_the_torch_file(tmp_path) -> None:
    _, model, _ = boost(gpt2(seed=0), "bf16")
    save_model(model, tmp_path / "m.pt")
    other = gpt2(seed=1)
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert_same(other.state_dict(), values(model))


def test_files_of_torchs_old_format_are_read(tmp_path) -> None:
    torch.save(gpt2(seed=3).state_dict(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    model = gpt2()
    load_model(model, tmp_path / "old.bin")
    assert_same(model.state_dict(), values(gpt2(seed=3)))


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_converted(tmp_path, stored: torch.dtype) -> None:
    state = {name: value.to(stored) for name, value in gpt2(seed=3).state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    _, model, _ = boost(gpt2(), "bf16")
    load_model(model, tmp_path / "m.pt")
    assert_same(model.state_dict(), {name: value.float() for name, value in state.items()})


def test_the_index_says_what_hugging_faces_says(tmp_path) -> None:
    _, model, _ = boost(gpt2())
    save_model(model, tmp_path, shard=True, size_per_shard="10KiB")
    gpt2().save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    ours, theirs = (
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path, tmp_path / "theirs")
    )
    assert ours["metadata"].pop("gemini_memory.id")
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    count = len(set(ours["weight_map"].values()))
    assert count > 3
    shards = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert sorted(set(ours["weight_map"].values())) == shards
    for shard in shards:
        tensors = safetensors.torch.load_file(tmp_path / shard)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 10 * 1024


def test_sharding_a_small_model_gives_one_file(tmp_path) -> None:
    _, model, _ = boost(gpt2())
    save_model(model, tmp_path, shard=True)
    assert without_configuration(tmp_path) == ["model.safetensors"]


def test_a_prefix_comes_before_the_names(tmp_path) -> None:
    _, model, _ = boost(gpt2(seed=0))
    for options in SHAPES[:2]:
        save_model(model, tmp_path, prefix="ema", **options)
        assert all(name.startswith("ema.") for name in without_configuration(tmp_path))
        other = gpt2(seed=1)
        load_model(other, tmp_path)
        assert_same(other.state_dict(), values(model))
    save_model(model, tmp_path / "x.pt", prefix="ema")
    assert (tmp_path / "ema.x.pt").exists()


def test_overwriting_in_any_form_leaves_only_the_new_checkpoint_and_foreign_files(tmp_path) -> None:
    booster, model, optimizer = boost(gpt2())
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sub").mkdir()
    for options in [*SHAPES, *SHAPES[::-1], SHAPES[1], SHAPES[1], SHAPES[0], SHAPES[3], SHAPES[1]]:
        train(booster, model, optimizer, range(1))
        save_model(model, tmp_path, **options)
        booster.save_optimizer(optimizer, tmp_path, shard="shard" in options, size_per_shard="10KiB")
        plain = gpt2(seed=1)
        load_model(plain, tmp_path)
        assert_same(plain.state_dict(), values(model))
        kind = "pytorch_model" if "use_safetensors" in options else "model"
        weights = [
            n
            for n in without_configuration(tmp_path)
            if not n.startswith("optimizer") and n not in ("notes.txt", "sub")
        ]
        assert all(name.startswith((f"{kind}.", f"{kind}-")) for name in weights), weights
        assert (len(weights) > 1) == ("shard" in options)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_on_a_file_system_without_links_new_files_get_names_that_are_free(tmp_path, monkeypatch) -> None:
    def no_links(*args, **kwargs) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    _, model, _ = boost(gpt2(seed=0))
    counts = set()
    for _ in range(4):  # usual names and others, in turn
        save_model(model, tmp_path, shard=True, size_per_shard="10KiB")
        other = gpt2(seed=1)
        load_model(other, tmp_path)
        assert_same(other.state_dict(), values(model))
        counts.add(len(names(tmp_path)))
        assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("m.pt", {"shard": True}, "give a folder, not"),
        ("file", {}, "is a file and not a folder"),
        ("folder", {"size_per_shard": 0}, "must be positive"),
        ("folder", {"size_per_shard": "5 apples"}, "expected a number of bytes"),
    ],
)
def test_mistakes_in_arguments_are_value_errors(tmp_path, checkpoint: str, options, message: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=message):
        save_model(mixed(), tmp_path / checkpoint, **options)


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path) -> None:
    save_model(gpt2(n_embd=16), tmp_path / "small")
    booster, model, _ = boost(gpt2())
    before = values(model)
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight: stored with shape \(96, 16\), .*\(96, 32\)"):
        booster.load_model(model, tmp_path / "small")
    with pytest.raises(CheckpointError, match="shape"):
        booster.load_model(model, tmp_path / "small", strict=False)
    assert_same(model.state_dict(), before)
