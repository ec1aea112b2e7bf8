"""Adapters of peft on several ranks: saved by all together or by the first one, merged by all."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import config, llama, tokens
from torch import Tensor

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

pytest.importorskip("peft", reason="peft is not installed")


def trained() -> tuple[Booster, Any]:
    """One step on the same batch on each rank; alone, the gradient is doubled instead."""
    import torch.distributed as dist

    warnings.simplefilter("ignore")  # peft's and transformers' own, about each other
    plugin = GeminiPlugin(precision="keep", telemetry=False, chunk_config_dict={1: {"chunk_size": 4096}})
    booster = Booster(plugin=plugin)
    torch.manual_seed(1)
    adapters = config(lora_dropout=0.0, modules_to_save=["lm_head"])
    model: Any = booster.enable_lora(llama(torch.bfloat16), adapters)
    optimizer: Any = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, *_ = booster.boost(model, optimizer)
    for _ in range(2 // dist.get_world_size()):
        booster.backward(model(input_ids=tokens(0), labels=tokens(0)).loss, optimizer)
    optimizer.step()
    return booster, model


def saved_and_merged(folder: str) -> dict[str, Tensor]:
    import torch.distributed as dist

    booster, model = trained()
    booster.save_lora_as_pretrained(model, f"{folder}/all", use_safetensors=True)
    if dist.get_rank() == 0:
        booster.save_lora_as_pretrained(model, f"{folder}/first")
    model.merge_adapter()
    model.unmerge_adapter()
    return {name: value.clone() for name, value in model.merge_and_unload().state_dict().items()}


@pytest.mark.heavy
def test_adapters_are_saved_by_all_or_the_first_and_merged_into_a_shared_base(worlds: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (alone,) = worlds(1).run(saved_and_merged, str(tmp_path / "1"))
    for found in worlds(2).run(saved_and_merged, str(tmp_path / "2")):
        assert all(torch.equal(found[name], value) for name, value in alone.items())
    one, two = (load_file(tmp_path / world / "all" / "adapter_model.safetensors") for world in ("1", "2"))
    first = torch.load(tmp_path / "2" / "first" / "adapter_model.bin")
    assert one.keys() == two.keys() == first.keys()
    assert all(torch.equal(two[name], one[name]) and torch.equal(first[name], one[name]) for name in one)
