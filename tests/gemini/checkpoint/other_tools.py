"""Folders of other tools, written as their code writes them, for models of five families."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from checkpoint_cases import VOCABULARY, gpt2, llama, mixtral
from torch import Tensor, nn


def t5(seed: int = 0) -> nn.Module:
    """Tied: the embeddings of encoder, decoder and head are one."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def bert(seed: int = 0) -> nn.Module:
    """Tied: the decoder's weight is the word embeddings', its bias that of the head."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(seed)
    return BertForMaskedLM(config)


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "GPT2": gpt2, "Llama": llama, "T5": t5, "Mixtral": mixtral, "BERT": bert,
}  # fmt: skip


def _shards(state: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    items = list(state.items())
    return [dict(items[begin : begin + 7]) for begin in range(0, len(items), 7)]


def colossalai(model: nn.Module, folder: Path, *, safe: bool) -> None:
    """``booster.save_model(model, folder, shard=True)`` of ColossalAI.

    Shards are numbered without their count, and tied tensors are there under each name
    (``colossalai/checkpoint_io/general_checkpoint_io.py``, ``save_sharded_model``, and ``utils.py``,
    ``get_shard_filename``; GeminiCheckpointIO writes the same).
    """
    folder.mkdir()
    base = "model.safetensors" if safe else "pytorch_model.bin"
    stem, suffix = base.rsplit(".", 1)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(model.state_dict())):
        file = f"{stem}-{number + 1:05d}.{suffix}"
        values = {name: value.clone() for name, value in shard.items()}
        total += sum(value.numel() * value.element_size() for value in values.values())
        if safe:
            safetensors.torch.save_file(values, folder / file, metadata={"format": "pt"})
        else:
            torch.save(values, folder / file)
        weight_map |= dict.fromkeys(values, file)
    index = {"metadata": {"total_size": total / 1024 / 1024}, "weight_map": weight_map}
    (folder / f"{base}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]


def colossalai_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """``booster.save_optimizer(optimizer, folder, shard=True)`` of ColossalAI.

    States by the number of their parameter, in shards; the groups, with what torch's Adam has besides, in a file of
    their own (``save_sharded_optimizer``, and ``get_param_groups_for_saving`` of
    ``colossalai/zero/gemini/gemini_optimizer.py``, whose steps are float32 tensors).
    """
    folder.mkdir()
    state = optimizer.state_dict()
    more = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}
    torch.save([{**more, **group} for group in state["param_groups"]], folder / "pytorch_optim_group.bin")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(state["state"])):
        file = f"pytorch_optim-{number + 1:05d}.bin"
        values = {i: {**each, "step": torch.tensor(float(each["step"]))} for i, each in shard.items()}
        torch.save(values, folder / file)
        weight_map |= {str(i): file for i in values}
    index = {"metadata": {"param_groups": "pytorch_optim_group.bin", "total_size": 1.0}, "weight_map": weight_map}
    (folder / "pytorch_optim.bin.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def deepspeed_gathered(model: nn.Module, folder: Path) -> None:
    """``save_16bit_model``, with ``stage3_gather_16bit_weights_on_model_save``: one file, tied tensors tied."""
    folder.mkdir()
    state: dict[str, Tensor] = model.state_dict()
    torch.save({name: value.bfloat16() for name, value in state.items()}, folder / "pytorch_model.bin")


def deepspeed_converted(model: nn.Module, folder: Path, *, safe: bool) -> None:
    """The output of ``zero_to_fp32.py``: shards named in Hugging Face's manner."""
    folder.mkdir()
    base, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    shards = _shards(model.state_dict())
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"{base}-{number + 1:05d}-of-{len(shards):05d}.{suffix}"
        values = {name: value.clone() for name, value in shard.items()}
        if safe:
            safetensors.torch.save_file(values, folder / file, metadata={"format": "pt"})
        else:
            torch.save(values, folder / file)
        weight_map |= dict.fromkeys(values, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{base}.{suffix}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def deepspeed_states(model: nn.Module, folder: Path) -> Path:
    """A checkpoint of ZeRO-2: what ``deepspeed/runtime/engine.py`` saves of the model, without objects."""
    step = folder / "global_step2"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step2")
    (folder / "zero_to_fp32.py").write_text("")
    states = {
        "module": {name: value.bfloat16() for name, value in model.state_dict().items()},
        "buffer_names": [], "optimizer": None, "param_shapes": None, "lr_scheduler": None, "global_steps": 2,
        "skipped_samples": 0, "dp_world_size": 1, "mp_world_size": 1, "ds_version": "0.17.0", "ds_config": {},
    }  # fmt: skip
    torch.save(states, step / "mp_rank_00_model_states.pt")
    return step / "mp_rank_00_model_states.pt"
