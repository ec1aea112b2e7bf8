"""A pretrained model is read lazily and boosted under a limit on memory that is smaller than its files."""

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import child
from child import Ended, run_child
from outcome import Check, Failure, Report, Scenario, Settings

from gemini.sizes import format_bytes

_FULL: dict[str, Any] = {"layers": 36, "hidden": 1024, "vocabulary": 8192, "shard_bytes": 200 << 20}
_SMALL: dict[str, Any] = {"layers": 8, "hidden": 512, "vocabulary": 1024, "shard_bytes": 12 << 20}

# In units of the bytes of the files: the limit above what a process has that has done the same with a tiny model.
_HEADROOM_RATIO = 0.5
_HOST_RATIO = 0.15
_TIMEOUT_SECONDS = 300.0


def run(settings: Settings) -> Report:
    shape = _SMALL if settings.small else _FULL
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as folder:
        made = _ask({"kind": "make", "folder": folder, **shape})
        total, wanted = made["total_bytes"], made["digest"]
        headroom = int((settings.headroom_ratio or _HEADROOM_RATIO) * total)
        asked = {"headroom_bytes": headroom, "host_bytes": int(_HOST_RATIO * total), "digest": wanted}
        ended = {
            form: _run({"kind": "read", "folder": f"{folder}/{form}", "tiny": f"{folder}/tiny", **asked})
            for form in ("safetensors", "bin")
        }
    limit = f"with {format_bytes(headroom)} of head-room"
    checks = [
        Check(
            f"{made['shards']} shards of {format_bytes(total)} as {form}, {limit}",
            "the values in the files",
            _outcome(each, wanted),
            each.result is not None and each.result["digest"] == wanted,
        )
        for form, each in ended.items()
    ]
    return Report(
        name=SCENARIO.name,
        checks=tuple(checks),
        facts={"total_bytes": total, "headroom_bytes": headroom, "shards": made["shards"]},
        peaks={f"peak VmData, {form}": each.data_growth_bytes for form, each in ended.items()},
    )


def _run(arguments: dict[str, Any]) -> Ended:
    return run_child("pretrained_larger_than_limit", arguments, timeout_seconds=_TIMEOUT_SECONDS)


def _ask(arguments: dict[str, Any]) -> dict[str, Any]:
    ended = _run(arguments)
    if ended.result is None:
        raise Failure(f"the files could not be made: {ended.errors.strip()[-300:]}")
    return ended.result


def _outcome(ended: Ended, wanted: int) -> str:
    if ended.result is None:
        last = ended.errors.strip().splitlines()[-1:] or [""]
        return f"died with {ended.returncode}: {last[0][:120]}"
    same = "these" if ended.result["digest"] == wanted else "others"
    return f"{same}, {format_bytes(ended.data_growth_bytes)} at peak"


SCENARIO = Scenario(
    name="pretrained_larger_than_limit",
    summary="from_pretrained in a lazy context and boost, under a limit that is smaller than the files",
    quick=False,
    run=run,
)


# -- the children


def _make(asked: dict[str, Any]) -> dict[str, Any]:
    """Write one model in both forms, and a tiny one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(layers: int, hidden: int, vocabulary: int) -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=8,
                num_key_value_heads=4,
            )
        )

    folder = Path(asked["folder"])
    llama(1, 64, 64).save_pretrained(folder / "tiny")
    model = llama(asked["layers"], asked["hidden"], asked["vocabulary"])
    model.save_pretrained(folder / "safetensors", max_shard_size=asked["shard_bytes"])
    index = json.loads((folder / "safetensors/model.safetensors.index.json").read_text())
    state = model.state_dict()
    where = {name: file.replace(".safetensors", ".bin") for name, file in index["weight_map"].items()}
    (folder / "bin").mkdir()
    for file in set(where.values()):
        part = {name: state[name].clone() for name, place in where.items() if place == file}
        torch.save(part, folder / "bin" / file)
    (folder / "bin/pytorch_model.bin.index.json").write_text(json.dumps({**index, "weight_map": where}))
    model.config.save_pretrained(folder / "bin")
    digest = 0
    for name, value in state.items():
        digest ^= _digest(name, value)
    return {
        "total_bytes": index["metadata"]["total_size"], "shards": len(set(where.values())), "digest": digest,
    }  # fmt: skip


def _read(folder: str, host_bytes: int, offload_dir: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from gemini import named_tensors
    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext

    with LazyInitContext():
        model = AutoModelForCausalLM.from_pretrained(folder)
    plugin = GeminiPlugin(precision="fp32", host_memory=host_bytes, offload_dir=offload_dir, telemetry=False)
    model, *_ = Booster(plugin=plugin).boost(model)
    digest = 0
    for name, value in named_tensors(model):
        digest ^= _digest(name, value)
    return {"digest": digest}


def _digest(name: str, value: Any) -> int:
    return zlib.crc32(name.encode(), zlib.crc32(value.contiguous().numpy().data))


def _child() -> None:
    asked = child.arguments()
    if asked["kind"] == "make":
        child.ready(None)
        child.finish(_make(asked))
        return
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as folder:
        _read(asked["tiny"], 1 << 20, folder)
        child.ready(asked["headroom_bytes"])
        result = _read(asked["folder"], asked["host_bytes"], folder)
    child.finish(result)


if __name__ == "__main__":
    _child()
